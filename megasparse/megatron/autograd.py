"""Two nodes of the autograd graph: the L1 term's gradient, and Megatron's contract for fused weight gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AttachL1(torch.autograd.Function):
    """Returns `y` unchanged; its backward gives `l1` the gradient `scale` and calls `on_backward`.

    The L1 term so enters the backward of any loss that `y` leads to, without a change to the loss function
    (Megatron's `MoEAuxLossAutoScaler` does the same for mixtures of experts). Recomputation of activations runs the
    forward twice but the backward once: that is why statistics are counted there.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, l1: Tensor, scale: Tensor, on_backward: Callable[[], None] | None) -> Tensor:
        """y [...], l1 fp32 [], scale fp32 []."""
        ctx.save_for_backward(scale)
        ctx.on_backward = on_backward
        ctx.dtype = l1.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        if ctx.on_backward is not None:
            ctx.on_backward()
        return grad_y, scale.to(ctx.dtype), None, None


def added_to_main_grad(parameter: torch.nn.Parameter) -> Tensor:
    """Tells Megatron that a gradient is in `parameter.main_grad` already; what a backward is to return in its place.

    Megatron's data-parallel hook wants a gradient to arrive nevertheless: a placeholder, of zeros where the weight asks
    for it (`zero_out_wgrad`: shared weights, whose placeholder is added), else uninitialised, never read.
    """
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(parameter, "zero_out_wgrad", False):
        return torch.zeros_like(parameter)
    return torch.empty_like(parameter)


class FusedWeightGrad(torch.autograd.Function):
    """Returns `weight` unchanged; its backward tells Megatron that the gradient is in `weight.main_grad` already.

    For weights whose gradient the consumer adds to `main_grad` itself, returning none.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parameter: torch.nn.Parameter) -> Tensor:
        ctx.parameter = parameter
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        parameter = ctx.parameter
        if not hasattr(parameter, "grad_added_to_main_grad"):
            return grad, None
        return added_to_main_grad(parameter), None
