"""The streaming writer writes what the safetensors library reads; the reader names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megasparse.hf.errors import ConvertError
from megasparse.hf.safetensors_files import Planned, WeightFiles, index_of, is_complete, plan_files, write_file

TENSORS = {
    "a": torch.randn(3, 5),
    "b.weight": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 2, 2).half(),
    "empty": torch.zeros(0, 4),
}
PLAN = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]


def test_the_library_reads_it(tmp_path: Path) -> None:
    counted = []
    write_file(tmp_path / "x.safetensors", PLAN, TENSORS.__getitem__, counted.append)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sum(counted) == sum(tensor.nbytes for tensor in TENSORS.values())
    assert list(tmp_path.iterdir()) == [tmp_path / "x.safetensors"]


def test_complete_files_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert not is_complete(path, PLAN)
    write_file(path, PLAN, TENSORS.__getitem__, lambda count: None)
    assert is_complete(path, PLAN)
    assert not is_complete(path, PLAN[:-1])
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_complete(path, PLAN)


def test_an_interrupted_file_has_no_name(tmp_path: Path) -> None:
    def fail(name: str) -> torch.Tensor:
        if name == "c":
            raise KeyboardInterrupt
        return TENSORS[name]

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "x.safetensors", PLAN, fail, lambda count: None)
    assert not (tmp_path / "x.safetensors").exists()


def test_files_are_bounded_and_indexed() -> None:
    tensors = [Planned(f"t{i}", (10,), torch.float32) for i in range(7)] + [Planned("large", (100,), torch.float32)]
    files = plan_files(tensors, 100)
    assert [len(group) for group in files.values()] == [2, 2, 2, 1, 1]
    assert next(iter(files)) == "model-00001-of-00005.safetensors"
    index = index_of(files)
    assert index["metadata"]["total_size"] == 7 * 40 + 400
    assert index["weight_map"]["large"] == "model-00005-of-00005.safetensors"
    assert list(plan_files(tensors, 10**6)) == ["model.safetensors"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no weights there"):
        WeightFiles(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConvertError, match=r"model\.safetensors: truncated"):
        WeightFiles(tmp_path)
    path.unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ConvertError, match=r"model-00001-of-00002\.safetensors: missing"):
        WeightFiles(tmp_path)
    save_file({"b": torch.zeros(10)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ConvertError, match="has no a, which"):
        WeightFiles(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConvertError, match="not an index"):
        WeightFiles(tmp_path)


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    with pytest.raises(ConvertError, match=r"model\.safetensors: a pointer of git-lfs, .* `git lfs pull` in"):
        WeightFiles(tmp_path)


def test_of_two_sets_of_weights_the_one_is_read_that_transformers_takes(tmp_path: Path) -> None:
    """An older index stays where a model is saved anew as one file."""
    save_file({"a": torch.zeros(3)}, tmp_path / "model-00001-of-00001.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    torch.save({"a": torch.full((3,), 2.0)}, tmp_path / "pytorch_model.bin")
    assert WeightFiles(tmp_path).read("a").tolist() == [0, 0, 0]
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert WeightFiles(tmp_path).read("a").tolist() == [1, 1, 1]


def test_pickled_weights_in_several_files(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in enumerate("ab", 1)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    files = WeightFiles(tmp_path)
    assert (files.read("b").tolist(), files.read("a").tolist(), files.shape("b")) == ([1, 1, 1], [0, 0, 0], (3,))
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(ConvertError, match=r"00001-of-00002\.bin: missing"):
        WeightFiles(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConvertError, match="int8"):
        WeightFiles(tmp_path).dtype("a")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(4, dtype=torch.int8)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConvertError, match="int8"):
        WeightFiles(tmp_path).dtype("a")
