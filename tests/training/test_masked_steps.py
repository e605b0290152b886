"""A step in which no token counts says nothing of the layers: it must move nothing that follows what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.launch import run_distributed
from tests.training.cases import END, configuration

STEPS = 6


def write_ends(prefix: Path) -> str:
    """A data set of ends of documents alone, none of which counts under `eod_mask_loss`."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(40):
        builder.add_document(torch.full((20,), END), [20])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_moves_where_no_token_counts(tmp_path: Path, data_folder: Path, world: int) -> None:
    found: dict[bool, Any] = {}
    for masked in (False, True):
        config = configuration(
            tmp_path / f"masked-{masked}",
            write_ends(tmp_path / "ends") if masked else str(data_folder / "a"),
            sparsity={
                "l1": {"mode": "target", "target_l0": 8, "coeff": 1e-3, "gain": 0.3},
                "reinit": {"every": 3, "until_fraction": 1.0},
                "dead_window_steps": 2,
            },
            parallel={"tensor": world},
            data={"eod_mask_loss": True, "tokenizer": str(data_folder / "tokenizer.json")},
            training={"steps": STEPS},
        )
        [found[masked]], *_ = run_distributed(world, "tests.training.cases:train_all", [config])
    for masked, record in found.items():
        for layer in range(4):
            coefficients = {metrics[f"l1/layer_{layer}/coeff"] for metrics in record["steps"].values()}
            assert len(coefficients) == (1 if masked else STEPS)
        revived = [value for metrics in record["steps"].values() for name, value in metrics.items() if "reinit" in name]
        assert sum(revived) == 0 if masked else sum(revived) > 0
