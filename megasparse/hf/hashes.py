"""SHA-256 of every tensor of a model, in either format: equal lists are models that are equal bit by bit.

A hash is that of the tensor's bytes alone: row by row, little-endian, in the names and shapes of the Hugging Face
format, without rows that pad the vocabulary. In Python:
`hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megasparse.hf.model_folder import ModelFolder
from megasparse.hf.source import open_checkpoint
from megasparse.hf.tensors import split


@dataclass(frozen=True)
class TensorHash:
    """One line of the list."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str

    def __str__(self) -> str:
        return f"{self.sha256}  {self.name}  {str(self.dtype).removeprefix('torch.')}  {list(self.shape)}"


def hash_tensors(
    path: Path, dtype: torch.dtype | None = None, down_by_neuron: bool | None = None
) -> Iterator[TensorHash]:
    """The hashes of a model's tensors, in the order of its layers; one weight is in memory at a time.

    Args:
        path: a Hugging Face folder (it holds a config.json), or a checkpoint or run.
        dtype: round the tensors to this type first; None: as they are stored.
        down_by_neuron: for Hugging Face folders, as in `ModelFolder`.

    Raises:
        ConvertError: a tensor is missing, of another shape or unreadable, or there is no model.
    """
    tensors = _of_folder(path, down_by_neuron) if (path / "config.json").is_file() else _of_checkpoint(path)
    for name, stored in tensors:
        tensor = stored.to(dtype or stored.dtype).contiguous()
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        yield TensorHash(name, tensor.dtype, tuple(tensor.shape), digest)


def hash_of_list(hashes: list[TensorHash]) -> str:
    """One SHA-256 for a whole model: that of its list, a line a tensor."""
    return hashlib.sha256("".join(f"{item}\n" for item in hashes).encode()).hexdigest()


def _of_folder(path: Path, down_by_neuron: bool | None) -> Iterator[tuple[str, Tensor]]:
    folder = ModelFolder(path, down_by_neuron)
    for name in folder.shapes:
        yield name, folder.tensor(name)
    folder.close()


def _of_checkpoint(path: Path) -> Iterator[tuple[str, Tensor]]:
    source = open_checkpoint(path)
    for weight in source.weights:
        parts = split(weight, source.reader.read(weight), source.model, source.vocab_size)
        yield from zip(weight.names, parts, strict=True)
