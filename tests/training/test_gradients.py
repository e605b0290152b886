"""Gradients after the backward: Megatron's result without its wait."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import run_distributed
from tests.training.cases import configuration, train_all


class Read(Exception):
    """The host looked at a number of the device."""


def compare(sections: dict[str, Any]) -> list[float]:
    """Largest difference of any gradient from what Megatron's own function makes of it, in every step."""
    from megatron.core.distributed import finalize_model_grads

    from megasparse.training import step
    from megasparse.training.gradients import finish_gradients

    differences = []

    def refuse(_: torch.Tensor) -> bool:
        raise Read

    def both(model: list[Any], num_tokens: torch.Tensor, **options: Any) -> None:
        buffers = [buffer.grad_data for chunk in model for buffer in chunk.buffers]
        before = [copy.deepcopy(buffer) for buffer in buffers]
        finalize_model_grads(model, num_tokens.clone(), **options)
        wanted = [copy.deepcopy(buffer) for buffer in buffers]
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "__bool__", refuse)
            patch.setattr(torch.Tensor, "item", refuse)
            finish_gradients(model, num_tokens, **options)
        assert any(float(values.abs().max()) > 0 for values in wanted)
        differences.append(max(float((a - b).abs().max()) for a, b in zip(buffers, wanted, strict=True)))

    with pytest.MonkeyPatch.context() as patch:  # the process serves other tests too
        patch.setattr(step, "finish_gradients", both)
        train_all([sections])
    return differences


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, {}), (2, {"tensor": 2, "sequence_parallel": True}), (2, {"pipeline": 2}), (2, {})]
)
def test_gradients_are_megatrons_and_no_host_waits_for_them(
    ranks: int, parallel: dict[str, Any], tmp_path: Path, data_folder: Path
) -> None:
    sections = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 5}, parallel=parallel)
    for differences in run_distributed(ranks, "tests.training.test_gradients:compare", sections):
        assert differences == [0.0] * 5
