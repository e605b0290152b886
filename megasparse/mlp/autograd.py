"""The MLP in eager code's graph of autograd; under torch.compile, the operators' own formulas are."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.mlp import steps
from megasparse.mlp.call import Call
from megasparse.mlp.types import MainGrads


class EagerMLP(torch.autograd.Function):
    """x [M, D] -> y [M, D], l1 [] and, without gradients, counts, fired, tile_counts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        w_down: Tensor,
        call: Call,
        order: Tensor | None,
        main_grads: MainGrads | None,
    ) -> tuple[Tensor, ...]:
        """`call` is of this x; the rest is as in `sparse_mlp`."""
        return steps.forward(ctx, x, w_in, w_down, call, order, main_grads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dl1: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, backward = steps.recall(ctx, dy, dl1)
        dx = backward.input_gradient(x)
        return dx, *backward.weight_gradients(x, ctx.main_grads), None, None, None
