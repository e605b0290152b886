"""Exported checkpoints load in transformers without remote code and give Megatron's logits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megasparse.hf.to_hf import ToHf, convert_to_hf
from tests.hf.cases import ARCHITECTURES, MODELS, VOCABULARY, config_of, contents, inputs, megasparse
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


def test_checkpoints_of_any_layout_export_the_same(saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    name = "llama-untied-gqa-scaled"
    run_distributed(1, "tests.hf.cases:save_all", tmp_path, [name], {})
    convert_to_hf(ToHf(tmp_path / name, tmp_path / "one"))
    convert_to_hf(ToHf(saved[name][0], tmp_path / "four"))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "four/model.safetensors").read_bytes()
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "four/config.json").read_bytes()


def test_bf16_export_is_the_rounded_model(saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    checkpoint, expected = saved["qwen3-bias"]
    convert_to_hf(ToHf(checkpoint, tmp_path / "fp32"))
    result = convert_to_hf(ToHf(checkpoint, tmp_path / "bf16", dtype="bf16"))
    exact, rounded = load_file(tmp_path / "fp32/model.safetensors"), load_file(tmp_path / "bf16/model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in exact.items())
    assert json.loads((tmp_path / "bf16/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert result.dtype == torch.bfloat16
    model, logits = run_hf(tmp_path / "bf16", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert np.abs(logits - expected).max() < 2**-6 * np.abs(expected).max()


def test_command_verifies_and_says_so(saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    checkpoint, _ = saved["qwen2"]
    before = contents(checkpoint)
    done = megasparse(
        "convert", "to-hf", checkpoint, tmp_path / "hf", "--verify", "--dtype", "bf16", "--shard-size", "20KB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "verified: both compute the same" in done.stdout
    assert "block 3" in done.stdout
    assert "All 51 tensors are equal bit by bit" in done.stdout
    assert re.search(r"top-1\) for (41\d\d) of \1 tokens", done.stdout)
    assert "no tokenizer" in done.stdout
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert contents(checkpoint) == before
    assert not list(tmp_path.glob(".*"))


def test_verification_finds_a_wrong_export(saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    checkpoint, _ = saved["llama-wide-heads"]
    convert_to_hf(ToHf(checkpoint, tmp_path / "hf"))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    (failed,) = run_distributed(1, "tests.hf.cases:verify", checkpoint, tmp_path / "hf")
    assert not failed.passed
    assert failed.different == [name]
    assert failed.embedding == 0.0
    assert max(failed.blocks[:2]) < 1e-5 < 1e-2 < failed.blocks[2]
