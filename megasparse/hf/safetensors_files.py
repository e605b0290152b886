"""safetensors: writing tensor by tensor into files of bounded size, reading tensor by tensor.

The library's own `save_file` takes all tensors of a file at once; here one tensor is in memory at a time. A file is
eight bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, byte range), the data.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse.hf.errors import ConvertError, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Planned:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(tensors: Iterable[Planned], limit: int) -> dict[str, list[Planned]]:
    """Distribute tensors over files of at most `limit` bytes (a larger tensor gets its own), in their order.

    The names are those of transformers: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on.
    """
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_file(
    path: Path, tensors: Sequence[Planned], read: Callable[[str], Tensor], done: Callable[[int], None]
) -> None:
    """Write one file under a temporary name and, complete and flushed, give it its own.

    Args:
        read: the tensor of a name, of the planned shape and type.
        done: called with the number of bytes after each tensor.
    """
    temporary = path.with_name(f".{path.name}.part")
    header = _header(tensors)
    with temporary.open("wb") as file:
        file.write(header)
        for planned in tensors:
            tensor = read(planned.name).contiguous()
            if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
                raise AssertionError(f"{planned.name}: {tuple(tensor.shape)} {tensor.dtype}, planned {planned}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            done(planned.nbytes)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def is_complete(path: Path, tensors: Sequence[Planned]) -> bool:
    """Whether the file is there with exactly these tensors and its full size."""
    header = _header(tensors)
    try:
        with path.open("rb") as file:
            same = file.read(len(header)) == header
        return same and path.stat().st_size == len(header) + sum(tensor.nbytes for tensor in tensors)
    except OSError:
        return False


def index_of(files: dict[str, list[Planned]]) -> dict[str, Any]:
    """Content of `model.safetensors.index.json`."""
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    names = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}


def _header(tensors: Sequence[Planned]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


class WeightFiles:
    """The weights of a model folder: safetensors or PyTorch's own format, one file or several with an index. Where
    there are more of these, the one that transformers takes.

    Raises ConvertError where files are missing, truncated or foreign.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        """Name of a tensor -> name of its file."""
        self._open: dict[str, Any] = {}
        present = [name for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX) if (folder / name).exists()]
        if not present:
            raise ConvertError(
                f"{folder}: no weights there ({SINGLE}, {INDEX} or {PICKLED}); give the folder of a complete model"
            )
        if present[0] in (SINGLE, PICKLED):
            self.files = dict.fromkeys(self._file(present[0]).keys(), present[0])
            return
        self.files = _weight_map(folder / present[0])
        for name in sorted(set(self.files.values())):
            held = set(self._file(name).keys())
            missing = [tensor for tensor, file in self.files.items() if file == name and tensor not in held]
            if missing:
                raise ConvertError(
                    f"{folder / name}: has no {missing[0]}, which {present[0]} places there; download the model again"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        handle = self._file(self.files[name])
        if isinstance(handle, dict):
            return tuple(handle[name].shape)
        return tuple(handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ConvertError where it is none of float32, bfloat16, float16."""
        handle = self._file(self.files[name])
        code = _CODES.get(handle[name].dtype, "") if isinstance(handle, dict) else handle.get_slice(name).get_dtype()
        for dtype, known in _CODES.items():
            if code == known:
                return dtype
        raise ConvertError(
            f"{self.folder / self.files[name]}: {name} is of type {self.read(name).dtype}; give a model in "
            "float32, bfloat16 or float16, not a quantised one"
        )

    def read(self, name: str) -> Tensor:
        handle = self._file(self.files[name])
        tensor: Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    def close(self) -> None:
        self._open.clear()

    def _file(self, name: str) -> Any:
        """An open file; one at a time, so that pages of finished files can leave memory."""
        if name not in self._open:
            self._open.clear()
            self._open[name] = _open_file(self.folder / name)
        return self._open[name]


def _open_file(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".bin":
            mapped = zipfile.is_zipfile(path)  # PyTorch's format before 1.6 is none, and is read whole
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            return {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ConvertError(f"{path}: missing; download the model again") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        if _is_pointer(path):
            raise ConvertError(
                f"{path}: a pointer of git-lfs, not the file; fetch it with `git lfs pull` in {path.parent}"
            ) from None
        reason = first_line(error)
        raise ConvertError(f"{path}: truncated or not a file of weights ({reason}); download it again") from None
    except Exception as error:  # torch.load's UnpicklingError among others
        raise ConvertError(f"{path}: not a file of weights ({first_line(error)}); download it again") from None


def _is_pointer(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs.github.com/spec/")
    return False


def _weight_map(path: Path) -> dict[str, str]:
    try:
        return {str(name): str(file) for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{path}: not an index of weights ({first_line(error)}); download it again") from None
