"""The MLP within a `torch.autograd.Function`: its forward, and its backward in steps for who communicates between them.

    forward -> recall -> input_gradient -> complete_input_gradient (x) -> weight_gradients (x)

Up to `complete_input_gradient` x need not be there, so that it can be on its way from other ranks meanwhile; during the
last, the gradient of x can be on its way to them (`megasparse/megatron/tensor_parallel.py`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from megasparse.mlp.call import Call, Path, run_forward
from megasparse.mlp.dense import dense_input_gradient, dense_weight_gradients
from megasparse.mlp.sparse import (
    sparse_input_gradient,
    sparse_input_gradient_again,
    sparse_weight_gradients,
)
from megasparse.mlp.types import MainGrads


class BackwardCall(NamedTuple):
    """What all steps share."""

    dy: Tensor
    """[M, D], contiguous."""
    dl1: Tensor | None
    """Gradient of the L1 sum; None: 0."""
    w_in: Tensor
    w_down: Tensor
    token_mask: Tensor | None
    order: Tensor | None
    sequences: int
    """As `call.Call` has them, and so is `path`."""
    path: Path
    saved: list[Tensor]
    """What `call.run_forward` returned after the five outputs."""


class BackwardSteps:
    """One backward. The values that later steps need live as long as this object."""

    def __init__(self, call: BackwardCall) -> None:
        self._call = call
        self._dx: Tensor | None = None
        self._values: list[Tensor] = []

    def input_gradient(self, x: Tensor | None) -> Tensor:
        """dx [M, D]. Without x it may be undefined until `complete_input_gradient`."""
        call = self._call
        if call.path == "dense":
            self._dx, *self._values = dense_input_gradient(
                call.dy, call.dl1, call.w_in, call.w_down, call.token_mask, *call.saved
            )
        else:
            self._dx, *self._values = sparse_input_gradient(
                call.dy, call.dl1, x, call.w_in, call.w_down, call.token_mask, call.order, call.sequences, call.saved
            )
        return self._dx

    def complete_input_gradient(self, x: Tensor) -> None:
        """Writes, given x [M, D], what `input_gradient` without x could not know: where the forward saved too little.

        Which is only known on the device. Elsewhere it costs a few launches.
        """
        call = self._call
        if call.path == "dense":
            return
        h, du, *dg = self._values
        assert self._dx is not None
        sparse_input_gradient_again(
            call.dy, call.dl1, x, call.w_in, call.w_down, call.token_mask, call.order, call.sequences, call.saved,
            self._dx, h, du, dg[0] if dg else None,
        )  # fmt: skip

    def weight_gradients(self, x: Tensor, main_grads: MainGrads | None) -> tuple[Tensor | None, Tensor | None]:
        """dw_in, dw_down; or, given buffers to add them to, None twice."""
        call = self._call
        main = main_grads if main_grads is not None else (None, None)
        if call.path == "dense":
            dw_in, dw_down = dense_weight_gradients(call.dy, x, *self._values, *main)
        else:
            dw_in, dw_down = sparse_weight_gradients(
                call.dy, x, call.w_in, call.w_down, call.order, call.sequences, call.saved[:3], self._values, *main
            )
        return (dw_in, dw_down) if main_grads is None else (None, None)


def forward(ctx: Any, kept: Tensor, w_in: Tensor, w_down: Tensor, call: Call) -> tuple[Tensor, ...]:
    """y, l1, counts, fired, tile_counts; of x, `ctx` keeps only `kept`, a part or all of it."""
    outputs = run_forward(call, w_in, w_down, True)
    keep(ctx, kept, w_in, w_down, call, outputs)
    return tuple(outputs[:5])


def keep(ctx: Any, kept: Tensor, w_in: Tensor, w_down: Tensor, call: Call, outputs: Sequence[Tensor]) -> None:
    """Puts into `ctx` what `recall` needs, given what `run_forward` returned."""
    ctx.mark_non_differentiable(*outputs[2:])
    ctx.set_materialize_grads(False)
    ctx.path, ctx.sequences, ctx.shape = call.path, call.sequences, call.tokens.shape
    ctx.save_for_backward(kept, w_in, w_down, call.token_mask, call.order, *outputs[5:])
    # Not saved tensors: other micro-batches add to them between this forward and its backward.
    ctx.main_grads = call.main_grads


def recall(ctx: Any, dy: Tensor | None, dl1: Tensor | None) -> tuple[Tensor, BackwardSteps]:
    """What `keep` was given of x, and the steps of the backward for these gradients of y [M, D] and l1."""
    kept, w_in, w_down, token_mask, order, *saved = ctx.saved_tensors
    dy = kept.new_zeros(ctx.shape) if dy is None else dy.contiguous()
    call = BackwardCall(dy, dl1, w_in, w_down, token_mask, order, ctx.sequences, ctx.path, saved)
    return kept, BackwardSteps(call)
