"""Exported checkpoints load in transformers without remote code and give Megatron's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megasparse.hf.to_hf import ToHf, convert_to_hf
from tests.hf.cases import ARCHITECTURES, MODELS, VOCABULARY, config_of, inputs
from tests.launch import run_distributed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Every one of MODELS saved at TP 2 x PP 2, with Megatron's logits there."""
    root = tmp_path_factory.mktemp("saved")
    logits = run_distributed(4, "tests.hf.cases:save_all", root, list(MODELS), {"tensor": 2, "pipeline": 2})[-1]
    return {name: (root / name, logits[name]) for name in MODELS}


def run_hf(folder: Path, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> tuple[Any, np.ndarray]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model, model(inputs(vocabulary)).logits.float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_megatron_s(name: str, saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    checkpoint, expected = saved[name]
    result = convert_to_hf(ToHf(checkpoint, tmp_path / "hf"))
    vocabulary = config_of(name)["model"]["vocab_size"]
    model, logits = run_hf(tmp_path / "hf", vocabulary)
    assert type(model).__name__ == ARCHITECTURES[name] == result.architecture
    assert logits.shape == expected.shape
    assert np.abs(expected).max() > 0.5
    assert np.abs(logits - expected).max() < 1e-5
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
    unique = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert result.parameters == sum(unique.values())
