"""What both directions of the conversion share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megasparse.hf.errors import ConvertError
from megasparse.hf.tensors import Weight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ASSETS_BYTES = 64 * 2**20
"""Room planned for the tokenizer and the JSON files."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Path
    checkpoint: Path
    architecture: str
    dtype: torch.dtype
    parameters: int
    nbytes: int
    files: int
    notes: list[str] = field(default_factory=list)


def adding_up(progress: Progress, total: int) -> Callable[[int], None]:
    """`progress` to be called with the bytes that have been done since the last call."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance


def to_dtype(tensor: Tensor, dtype: torch.dtype, path: Path, weight: Weight) -> Tensor:
    """The weight in another type. Raises ConvertError where it holds values that float16 has not."""
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not bool(torch.isfinite(rounded).all()):
        raise ConvertError(f"{path}: {weight.where} has values beyond float16's range; give --dtype bf16 or fp32")
    return rounded
