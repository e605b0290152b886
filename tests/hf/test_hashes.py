"""The list of hashes: the same for a model in either format, and what hashlib gives for the file's own bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megasparse.hf.from_hf import FromHf, convert_from_hf
from megasparse.hf.hashes import hash_tensors
from megasparse.hf.to_hf import ToHf, convert_to_hf
from tests.commands import Commands
from tests.hf.test_from_hf import make_model, publish, rewrite


@pytest.mark.parametrize("name", ["llama-untied-gqa-scaled", "arcee-bias"])
def test_both_formats_have_the_same_list(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path / "in", dtype=torch.bfloat16)
    convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "out", shard_bytes=10_000))
    expected = {}
    for file in (tmp_path / "in").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                data = tensors.get_tensor(key).contiguous().view(torch.uint8).numpy()
                expected[key] = hashlib.sha256(data).hexdigest()
    zeros = {key for key in expected if key.endswith("o_proj.bias")}  # what Megatron's model does not have
    for path in (tmp_path / "in", tmp_path / "checkpoint", tmp_path / "out"):
        found = {item.name: item.sha256 for item in hash_tensors(path)}
        assert found.keys() == expected.keys() - zeros
        assert all(expected[key] == value for key, value in found.items())


def test_command_prints_the_list_and_notices_one_changed_bit(tmp_path: Path, commands: Commands) -> None:
    publish(tmp_path / "in", gated=True, layout="by-neuron")
    convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    first, second = (commands("convert", "hashes", tmp_path / name) for name in ("in", "checkpoint"))
    assert (first.returncode, first.stdout) == (0, second.stdout)
    assert "  model.layers.3.mlp.down_proj.weight  float32  [32, 48]\n" in first.stdout
    assert first.stdout.splitlines()[-1].endswith("  all 38 tensors")

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].view(torch.int32)[5] ^= 1

    rewrite(tmp_path / "in", flip)
    third = commands("convert", "hashes", tmp_path / "in").stdout.splitlines()
    different = [a for a, b in zip(first.stdout.splitlines(), third, strict=True) if a != b]
    assert [line.split("  ")[1] for line in different] == ["model.norm.weight", "all 38 tensors"]


def test_a_missing_key_is_one_sentence(tmp_path: Path, commands: Commands) -> None:
    make_model("llama-tied", tmp_path / "in")
    rewrite(tmp_path / "in", lambda tensors: tensors.pop("model.layers.2.self_attn.k_proj.weight"))
    for arguments in (("hashes", tmp_path / "in"), ("from-hf", tmp_path / "in", tmp_path / "out")):
        done = commands("convert", *arguments)
        assert done.returncode == 2
        assert "a tensor is missing: model.layers.2.self_attn.k_proj.weight" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
