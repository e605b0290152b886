"""The sparse MLP's input under tensor parallelism: communicated while something else is computed.

As Megatron's column-parallel linear does it: the sum over ranks of the input's gradient (under sequence parallelism
its reduce-scatter) runs beside the gradients of the weights. Under sequence parallelism a rank keeps its own part of
the input only, and the backward gathers the whole again, beside the product of the input's gradient.

On a GPU both run beside kernels because they are launched before them: the order of launches is that of execution where
CUDA_DEVICE_MAX_CONNECTIONS is 1, as Megatron asks. `wait` makes the current stream wait, not the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.mlp import MainGrads, MLPOutput, MLPStats, Path, steps
from megasparse.mlp.call import Call, prepare, run_forward


def tensor_parallel_mlp(
    part: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    *,
    group: torch.distributed.ProcessGroup,
    token_mask: Tensor | None,
    sequences: int,
    path: Path,
    order: Tensor | None,
    capacity: int | None,
    main_grads: MainGrads | None,
) -> MLPOutput:
    """`sparse_mlp(x, ...)` whose gradient is summed over the group and arrives at `part`.

    Args:
        part: this rank's part of x along its first dimension (sequence parallelism); or all of x.
        x: [s, b, D], the parts of all ranks one after the other, without autograd.
        group: tensor-parallel ranks, which share x and have other neurons.

    Returns:
        As `sparse_mlp`, of this rank's neurons: y is yet to be summed over the group.
    """
    call = prepare(x.detach(), w_in, w_down, token_mask, sequences, path, order, capacity, main_grads)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (part, w_in, w_down)):
        y, l1, *stats = _TensorParallelMLP.apply(part, w_in, w_down, group, call)
    else:
        y, l1, *stats = run_forward(call, w_in, w_down, False)[:5]
    return MLPOutput(y.view(x.shape), l1, MLPStats(*stats))


class _TensorParallelMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: Tensor,
        w_in: Tensor,
        w_down: Tensor,
        group: torch.distributed.ProcessGroup,
        call: Call,
    ) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.gathered = call.tokens.numel() != part.numel()
        return steps.forward(ctx, part, w_in, w_down, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dl1: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        part, backward = steps.recall(ctx, dy, dl1)
        group, shape = ctx.group, list(part.shape)
        if ctx.gathered:
            x = part.new_empty([shape[0] * group.size(), *shape[1:]])
            gathering = torch.distributed.all_gather_into_tensor(x, part.contiguous(), group=group, async_op=True)
            x_rows = x.view(-1, shape[-1])
            dx = backward.input_gradient(None)
            gathering.wait()
            backward.complete_input_gradient(x_rows)
            d_part = part.new_empty(shape)
            reduction = torch.distributed.reduce_scatter_tensor(d_part, dx.view(x.shape), group=group, async_op=True)
        else:
            x_rows = part.contiguous().view(-1, shape[-1])
            dx = d_part = backward.input_gradient(x_rows)
            reduction = torch.distributed.all_reduce(dx, group=group, async_op=True)
        dw_in, dw_down = backward.weight_gradients(x_rows, ctx.main_grads)
        reduction.wait()
        return d_part.view(shape), dw_in, dw_down, None, None
