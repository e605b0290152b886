"""Cross entropy of a vocabulary that is cut over tensor-parallel ranks, in the memory of the logits.

Megatron-Core's own makes fp32 copies of the logits, the largest tensors of a model: 3.2 GB each at 16384 tokens and a
vocabulary of 49152. Transformer Engine's works in place, but stores softmax in bf16 and takes the label's one away
from that: near a probability of one, bf16 knows steps of 0.004, so that the gradient of well predicted tokens is lost.
Here the forward reads the logits once; the backward writes the gradient over them, rounded once, from fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Loss of every token, fp32, shaped as `labels`; nats.

    Args:
        logits: [..., V / tp], contiguous, bf16 or fp32: this rank's part of the vocabulary, in order of rank. The
            backward overwrites it, so nobody else may need it; a second backward raises RuntimeError.
        labels: int64 of logits' leading shape, over the whole vocabulary.
        group: tensor-parallel group.
    """
    rows = logits.view(-1, logits.shape[-1])
    loss: Tensor = _CrossEntropy.apply(rows, labels.reshape(-1), group)
    return loss.view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        local = labels - group.rank() * logits.shape[1]
        maximum, total, target = _row_statistics(logits, local)
        if group.size() > 1:
            own = maximum
            maximum = own.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([total * torch.exp(own - maximum), target])
            dist.all_reduce(sums, group=group)
            total, target = sums.unbind()
        normaliser = maximum + torch.log(total)
        ctx.save_for_backward(logits, local, normaliser)
        ctx.spent = False
        return normaliser - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.spent:
            raise RuntimeError("the cross entropy's backward has overwritten the logits: it cannot run twice")
        ctx.spent = True
        logits, local, normaliser = ctx.saved_tensors
        _write_gradient(logits, local, normaliser, grad.float().contiguous())
        return logits, None, None


def _row_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [N] each: maximum x, sum of exp(x - maximum), the label's x (0 where the label is another rank's)."""
    if _triton_applies(logits):
        from megasparse.megatron import cross_entropy_triton

        return cross_entropy_triton.row_statistics(logits, labels)
    values = logits.float()
    maximum = values.amax(1)
    # Ranks whose whole part is excluded (padding) have -inf everywhere.
    base = torch.where(maximum == -torch.inf, 0.0, maximum)
    total = torch.exp(values - base[:, None]).sum(1)
    here = (labels >= 0) & (labels < logits.shape[1])
    target = values.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return maximum, total, torch.where(here, target, 0.0)


def _write_gradient(logits: Tensor, labels: Tensor, normaliser: Tensor, grad: Tensor) -> None:
    """logits <- (softmax - label's one) * grad, given log of the sum of exponentials, fp32 [N]."""
    if _triton_applies(logits):
        from megasparse.megatron import cross_entropy_triton

        return cross_entropy_triton.write_gradient(logits, labels, normaliser, grad)
    result = torch.exp(logits.float() - normaliser[:, None])
    row = torch.nonzero((labels >= 0) & (labels < logits.shape[1]))[:, 0]
    result[row, labels[row]] -= 1.0
    logits.copy_(result * grad[:, None])
    return None


def _triton_applies(logits: Tensor) -> bool:
    if not logits.is_cuda or logits.numel() == 0:
        return False
    from megasparse.megatron import cross_entropy_triton

    return cross_entropy_triton.AVAILABLE
