"""The MLP in autograd's graph: of eager code, and of code under torch.compile, which must see the operators."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.mlp import steps
from megasparse.mlp.call import Call
from megasparse.mlp.dense import dense_forward
from megasparse.mlp.sparse import sparse_forward
from megasparse.mlp.types import MainGrads


class EagerMLP(torch.autograd.Function):
    """x [M, D] -> y [M, D], l1 [] and, without gradients, counts, fired, tile_counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_down: Tensor, call: Call) -> tuple[Tensor, ...]:
        """`call` is of this x; the rest is as in `sparse_mlp`."""
        return steps.forward(ctx, x, w_in, w_down, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dl1: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_backward(ctx, dy, dl1), None


def _backward(ctx: Any, dy: Tensor | None, dl1: Tensor | None) -> tuple[Tensor | None, ...]:
    """dx, dw_in, dw_down."""
    x, backward = steps.recall(ctx, dy, dl1)
    dx = backward.input_gradient(x)
    return dx, *backward.weight_gradients(x, ctx.main_grads)


def _main_grads(w_in: Tensor | None, w_down: Tensor | None) -> MainGrads | None:
    return None if w_in is None or w_down is None else MainGrads(w_in, w_down)


def _keep_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_in, w_down, token_mask, sequences, _, *main = inputs
    call = Call(x, token_mask, sequences, path="dense", order=None, capacity=0, main_grads=_main_grads(*main))
    steps.keep(ctx, x, w_in, w_down, call, output)


def _keep_sparse(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, w_in, w_down, token_mask, order, sequences, _, capacity, *main = inputs
    call = Call(x, token_mask, sequences, path="sparse", order=order, capacity=capacity, main_grads=_main_grads(*main))
    steps.keep(ctx, x, w_in, w_down, call, output)


def _backward_dense(ctx: Any, dy: Tensor | None, dl1: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, dy, dl1), *(None,) * 5


def _backward_sparse(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, *grads[:2]), *(None,) * 7


dense_forward.custom.register_autograd(_backward_dense, setup_context=_keep_dense)
sparse_forward.custom.register_autograd(_backward_sparse, setup_context=_keep_sparse)
