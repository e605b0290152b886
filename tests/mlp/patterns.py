"""Inputs whose gates have a given pattern, and the MLP written with autograd in fp64 as the oracle."""

from typing import NamedTuple

import torch
from torch import Tensor

PATTERNS = ("random", "sparse", "all_on", "all_off", "one_row", "one_column", "alternating_tiles")


class Case(NamedTuple):
    x: Tensor
    w_in: Tensor
    w_down: Tensor
    dy: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        return Case(*(tensor.to(device, dtype) for tensor in self))

    @property
    def hidden(self) -> int:
        return self.w_down.shape[0]


def make_case(tokens: int, width: int, hidden: int, gated: bool, pattern: str, seed: int = 0) -> Case:
    """fp64 tensors. Column 0 of x times column 0 of the gate's weight acts as a bias that sets the pattern."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    w_in = torch.randn(2 * hidden if gated else hidden, width, dtype=torch.float64, generator=generator) / width**0.5
    w_down = torch.randn(hidden, width, dtype=torch.float64, generator=generator) / hidden**0.5
    dy = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    bias = 8.0  # against a standard deviation of 1
    gate = w_in[:hidden]
    if pattern == "sparse":
        x[:, 0] = 1
        gate[:, 0] = -1.5
    elif pattern in ("all_on", "all_off"):
        x[:, 0] = 1
        gate[:, 0] = bias if pattern == "all_on" else -bias
    elif pattern == "one_row" and tokens:
        x[:, 0] = -1
        x[tokens // 2, 0] = 1
        gate[:, 0] = bias
    elif pattern == "one_column":
        x[:, 0] = 1
        gate[:, 0] = -bias
        gate[hidden // 2, 0] = bias
    elif pattern == "alternating_tiles":  # every token tile uses other neurons
        x[:, 0] = torch.where(torch.arange(tokens) // 128 % 2 == 0, 1.0, -1.0)
        gate[:, 0] = torch.where(torch.arange(hidden) % 2 == 0, bias, -bias)
    return Case(x, w_in, w_down, dy)


class Reference(NamedTuple):
    y: Tensor
    l1: Tensor
    dx: Tensor
    dw_in: Tensor
    dw_down: Tensor
    active: Tensor
    magnitudes: tuple[Tensor, ...]
    """Of y, l1, dx, dw_in, dw_down with every term of every sum taken positive: what rounding errors scale with."""


def reference(case: Case, l1_weight: float, token_mask: Tensor | None = None) -> Reference:
    """Gradients of sum(y * dy) + l1_weight * l1 by autograd in fp64."""
    x, w_in, w_down = (tensor.double().detach().requires_grad_() for tensor in case[:3])
    hidden = case.hidden
    a = x @ w_in.t()
    g = torch.relu(a[:, :hidden])
    h = g * a[:, hidden:] if w_in.shape[0] != hidden else g
    y = h @ w_down
    magnitudes = h.abs().sum(1)
    l1 = magnitudes.sum() if token_mask is None else magnitudes[token_mask].sum()
    loss = (y * case.dy.double()).sum() + l1_weight * l1
    gradients = torch.autograd.grad(loss, (x, w_in, w_down))
    with torch.no_grad():  # a and h are still part of the graph
        dy = case.dy.double().abs()
        dh = dy @ w_down.abs().t() + abs(l1_weight)
        active = g != 0
        da = torch.cat([dh * a[:, hidden:].abs() * active, dh * g], 1) if w_in.shape[0] != hidden else dh * active
        products = (h.abs() @ w_down.abs(), l1.detach(), da @ w_in.abs(), da.t() @ x.abs(), h.abs().t() @ dy)
    return Reference(y.detach(), l1.detach(), *gradients, active, products)


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """||value - wanted|| / ||wanted||; NaN where value has any."""
    norm = float(wanted.double().norm())
    error = float((value.double() - wanted.double()).norm())
    return error / norm if norm else error


def rows_of_tokens(tokens: int, sequences: int) -> Tensor:
    """int64 [M]: row of token t of `sequences` sequences in x [s, b, D], tokens numbered sequence after sequence."""
    length = tokens // sequences
    return torch.tensor([t % length * sequences + t // length for t in range(tokens)])


def interleaved(case: Case, sequences: int) -> Case:
    """A case whose tokens are in the order of `rows_of_tokens`, with x and dy as [s, b, D] has them."""
    rows = rows_of_tokens(case.x.shape[0], sequences).to(case.x.device)
    x, dy = torch.empty_like(case.x), torch.empty_like(case.dy)
    x[rows], dy[rows] = case.x, case.dy
    return case._replace(x=x, dy=dy)
