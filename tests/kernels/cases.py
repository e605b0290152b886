"""Sizes and patterns that the kernel tests share."""

import torch
from torch import Tensor

SIZES = [(1, 704, 64), (7, 1408, 128), (129, 5640, 2048), (4095, 704, 520), (300, 1408, 8192)]
PATTERNS = ("sparse", "half", "none", "all", "row_column_tile")


def active_positions(m: int, h: int, pattern: str) -> Tensor:
    """bool [M, H]."""
    active = torch.zeros(m, h, dtype=torch.bool, device="cuda")
    if pattern in ("sparse", "half"):
        active = torch.rand(m, h, device="cuda") < (0.02 if pattern == "sparse" else 0.5)
    elif pattern == "all":
        active[:] = True
    elif pattern == "row_column_tile":
        active[:, h // 3] = True
        active[m // 2] = True
        active[: min(m, 128), 256:512] = True
    return active


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()
