"""The public function: one tensor-parallel rank's ReLU MLP, by dense products or by the sparse kernels."""

import torch
from torch import Tensor

from megasparse.mlp.autograd import EagerMLP
from megasparse.mlp.call import Path, prepare, run_forward
from megasparse.mlp.operator import is_traced
from megasparse.mlp.types import MainGrads, MLPOutput, MLPStats


def sparse_mlp(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    *,
    token_mask: Tensor | None = None,
    sequences: int = 1,
    path: Path = "dense",
    order: Tensor | None = None,
    capacity: int | None = None,
    main_grads: MainGrads | None = None,
) -> MLPOutput:
    """Apply the ReLU MLP and return its output, the L1 sum of its hidden activations, and statistics.

    Args:
        x: [..., D], fp64, fp32 or bf16.
        w_in: [2 H, D], rows of the gate, then rows of the up product: `h = relu(x Wg^T) * (x Wu^T)`; or
            [H, D]: `h = relu(x W_in^T)` (non-gated). Type of x.
        w_down: [H, D], one row per neuron (the transpose of `torch.nn.Linear`'s): `y = h W_down`.
        token_mask: bool of x's leading shape, True where the token counts; the others are computed, but count
            neither in `l1` (value or gradient) nor in the statistics. None: all count.
        sequences: b where the rows of x are those of [s, b, D] (Megatron's order): tiles of 128 tokens are then
            cut along each sequence, whose neighbours share more neurons: fewer in each tile's union. Where s
            is no multiple of 128, tiles are cut along the rows, as with 1. Results depend on it by rounding
            only, `union` and `tile_counts` of the statistics describe those tiles.
        path: "dense" runs dense products; "sparse" computes only what active neurons need. Both are exact.
            Where the kernels do not apply, "sparse" runs dense and says why once (`unsupported_reason`).
        order: int32 [H] permutation, most frequently active neuron first: makes the sparse path's weight
            gradients cheaper (`LayerRouter`); results depend on it by rounding only. None: natural.
        capacity: non-zeros that the sparse path's saved buffers hold (`LayerRouter.capacity`). Where there
            are more, the backward computes them again: exact, but slower. None: a sixteenth of M x H.
        main_grads: fp32 buffers to add the weight gradients to; autograd then gets none for the weights. In
            code under torch.compile, only one call may await its backward (PyTorch raises otherwise).

    Returns:
        `MLPOutput`. The gradient of its `l1`, times sign(h), is added to the gradient of h in the backward.

    Raises:
        ValueError: for shapes, types or devices that do not fit together.
    """
    call = prepare(x, w_in, w_down, token_mask, sequences, path, order, capacity, main_grads)
    save = torch.is_grad_enabled() and (x.requires_grad or w_in.requires_grad or w_down.requires_grad)
    if save and not is_traced(call.tokens):
        y, l1, *stats = EagerMLP.apply(call.tokens, w_in, w_down, call)
    else:
        y, l1, *stats = run_forward(call, w_in, w_down, save)[:5]
    return MLPOutput(y.view(x.shape), l1, MLPStats(*stats))
