"""The MLP with dense products, forward and backward written out, as torch operators.

    a = x W_in^T      g = relu(a[:, :H])      u = a[:, H:]      h = g * u      y = h W_down        (gated)
    a = x W_in^T      h = relu(a)                                              y = h W_down        (non-gated)

Gate and up are one product in each direction. Saved for the backward: `a` (2 H or H numbers a token); the
backward recomputes g and h from it in the pass that forms da. The gradients of the weights are an operator of
their own, so that the gradient of the input can be sent meanwhile. It is the reference of the kernels, what runs
where they cannot, and what runs where a layer is not sparse enough to pay.
"""

import torch
from torch import Tensor

from megasparse.mlp import dense_elementwise as elementwise
from megasparse.mlp.operator import operator


def _accumulate_product(main: Tensor, a: Tensor, b: Tensor) -> None:
    """main += a @ b, `main` fp32; accumulates in fp32 without a temporary where the device's GEMM can."""
    if main.dtype == a.dtype:
        main.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(main, a, b, main.dtype, out=main)
    else:
        main.add_(a @ b)


def weight_gradient(a: Tensor, b: Tensor, main: Tensor | None) -> Tensor:
    """a^T b, or add it to `main` and return an empty tensor (an operator cannot return None)."""
    if main is None:
        return a.t() @ b
    _accumulate_product(main, a.t(), b)
    return a.new_empty(0)


@operator("megasparse::mlp_dense_forward")
def dense_forward(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    sequences: int,
    save: bool,
    main_w_in: Tensor | None,
    main_w_down: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [M, D] -> y [M, D], l1 [], counts int64 [4], fired bool [H], tile_counts int32 [H], a or empty.

    `counts` holds tokens, active, union, tiles as in `MLPStats`; `sequences` is `tiled_sequences`'s.
    `main_w_in` and `main_w_down` are not read: they only travel to the backward.
    """
    hidden = w_down.shape[0]
    a = x @ w_in.t()
    h, l1, counts, fired, tile_counts = elementwise.forward(a, hidden, token_mask, sequences)
    return h @ w_down, l1, counts, fired, tile_counts, a if save else a.new_empty(0)


@dense_forward.custom.register_fake
def _(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    sequences: int,
    save: bool,
    main_w_in: Tensor | None,
    main_w_down: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *fake_outputs(x, w_down), x.new_empty(x.shape[0], w_in.shape[0]) if save else x.new_empty(0)


def fake_outputs(x: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised y, l1, counts, fired, tile_counts: shapes and types that both paths return."""
    l1 = x.new_empty((), dtype=elementwise.sum_dtype(x.dtype))
    counts = x.new_empty(4, dtype=torch.int64)
    fired = x.new_empty(w_down.shape[0], dtype=torch.bool)
    return x.new_empty(x.shape), l1, counts, fired, x.new_empty(w_down.shape[0], dtype=torch.int32)


def _hidden_gradient(dy: Tensor, w_down: Tensor, dtype: torch.dtype) -> Tensor:
    """dy W_down^T [M, H] in `dtype`: that of dy, or fp32."""
    if dtype == dy.dtype:
        return dy @ w_down.t()
    if dy.is_cuda:
        return torch.mm(dy, w_down.t(), out_dtype=dtype)
    return dy.to(dtype) @ w_down.t().to(dtype)


@operator("megasparse::mlp_dense_input_gradient")
def dense_input_gradient(
    dy: Tensor, dl1: Tensor | None, w_in: Tensor, w_down: Tensor, token_mask: Tensor | None, a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy [M, D], a from the forward -> dx [M, D], then what the weight gradients need: h [M, H], da like a."""
    hidden = w_down.shape[0]
    # Less than half an ulp of dh, as the L1 gradient often is, would vanish when added to a dh on bf16's grid. With a
    # gate the product with u or g comes before the next rounding and keeps it on average; without one dh stays wide.
    # (cuBLAS's own addition, `addmm`, comes after its rounding.)
    stays_wide = dl1 is not None and w_in.shape[0] == hidden
    dh = _hidden_gradient(dy, w_down, elementwise.sum_dtype(dy.dtype) if stays_wide else dy.dtype)
    h, da = elementwise.backward(a, hidden, dh, dl1, token_mask)
    return da @ w_in, h, da


@dense_input_gradient.custom.register_fake
def _(
    dy: Tensor, dl1: Tensor | None, w_in: Tensor, w_down: Tensor, token_mask: Tensor | None, a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[0], w_down.shape[0]), a.new_empty(a.shape)


@operator("megasparse::mlp_dense_weight_gradients", mutates_args=("main_w_in", "main_w_down"))
def dense_weight_gradients(
    dy: Tensor, x: Tensor, h: Tensor, da: Tensor, main_w_in: Tensor | None, main_w_down: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dw_in, dw_down; given main gradients, adds to them and returns both empty."""
    return weight_gradient(da, x, main_w_in), weight_gradient(h, dy, main_w_down)


@dense_weight_gradients.custom.register_fake
def _(
    dy: Tensor, x: Tensor, h: Tensor, da: Tensor, main_w_in: Tensor | None, main_w_down: Tensor | None
) -> tuple[Tensor, Tensor]:
    width = x.shape[1]
    w_in, w_down = x.new_empty(da.shape[1], width), x.new_empty(h.shape[1], width)
    return fake_weight_gradients(w_in, w_down, main_w_in, main_w_down)


def fake_weight_gradients(
    w_in: Tensor, w_down: Tensor, main_w_in: Tensor | None, main_w_down: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Uninitialised dw_in, dw_down: shapes and types that both paths return."""
    dw_in = w_in.new_empty(w_in.shape) if main_w_in is None else w_in.new_empty(0)
    dw_down = w_down.new_empty(w_down.shape) if main_w_down is None else w_down.new_empty(0)
    return dw_in, dw_down
