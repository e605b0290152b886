"""Mean and mean square of the inputs of one sparse MLP over some micro-batches, accumulated on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class InputMoments:
    """Sums over this rank's tokens, padding included. Add `table` over the data- and context-parallel ranks.

    Tensor-parallel ranks see the same tokens. A layer that is recomputed sees them twice, which changes no mean.
    """

    def __init__(self, width: int, device: torch.device | str | int) -> None:
        self.table = torch.zeros(width + 2, dtype=torch.float32, device=device)
        """fp32 [D + 2]: sum of the inputs, sum of their squared lengths, number of tokens."""

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Counts the tokens of x [..., D]."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self.table[:-2] += rows.sum(0, dtype=torch.float32)
        self.table[-2] += torch.linalg.vector_norm(rows, dtype=torch.float32).square()
        self.table[-1] += rows.shape[0]

    @staticmethod
    def read(table: Tensor) -> tuple[Tensor, float]:
        """A summed table -> (mean input fp32 [D], mean squared length of an input). Waits for the device."""
        means = table[:-1] / table[-1].clamp(min=1.0)
        return means[:-1], float(means[-1])
