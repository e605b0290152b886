"""The CUDA kernels behind `path="sparse"`: when they apply, and the operators' CUDA implementations.

The kernels are in `csrc/` and are built at first use (`build.py`). They need compute capability 9.0 and bf16.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from megasparse.mlp.token_order import mask_by_sequence

_log = logging.getLogger("megasparse.mlp")

ALIGNMENT = 8
"""D must be a multiple of this: rows are copied in pieces of 16 bytes."""

MAX_NEURONS = 65536
"""Offsets within a row are 16-bit."""


@functools.cache
def _library_problem(index: int) -> str | None:
    """Why the kernels cannot run on CUDA device `index`; None (and the library loaded) if they can."""
    capability = torch.cuda.get_device_capability(index)
    if capability != (9, 0):
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels are for 9.0 (Hopper)"
    from megasparse.mlp import build  # not at the top: `python -m megasparse.mlp.build` runs that file

    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None


def device_reason(device: torch.device, dtype: torch.dtype, width: int, hidden: int) -> str | None:
    """Why there are no kernels for layers of this device, type, D and H; None if there are. May build them."""
    if device.type != "cuda":
        return f"there are no kernels for {device.type} devices"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_reason(index, dtype, width, hidden, True)


def unsupported_reason(x: Tensor, w_in: Tensor, w_down: Tensor) -> str | None:
    """Why `path="sparse"` cannot run on these tensors; None if it can. Builds the kernels at the first
    call."""
    if not x.is_cuda:
        return None if x.device.type == "cpu" else f"there are no kernels for {x.device.type} devices"
    contiguous = w_in.is_contiguous() and w_down.is_contiguous()
    return _cuda_reason(x.device.index or 0, x.dtype, x.shape[-1], w_down.shape[0], contiguous)


@torch.compiler.assume_constant_result
def _cuda_reason(index: int, dtype: torch.dtype, width: int, hidden: int, contiguous: bool) -> str | None:
    if dtype != torch.bfloat16:
        return f"the kernels compute in bf16, not {dtype}"
    if width % ALIGNMENT:
        return f"the kernels need a hidden size that is a multiple of {ALIGNMENT}, not {width}"
    if not 1 <= hidden <= MAX_NEURONS:
        return f"the kernels take 1 to {MAX_NEURONS} neurons a rank, not {hidden}"
    if not contiguous:
        return "the kernels need contiguous weights"
    return _library_problem(index)


@torch.compiler.assume_constant_result
@functools.cache
def note_dense(reason: str) -> None:
    """Say, once per reason, that a layer asked to run sparse runs dense."""
    _log.warning("The sparse MLP runs its dense path: %s.", reason)


def register(forward: Any, input_gradient: Any, input_gradient_again: Any, weight_gradients: Any) -> None:
    """Give the operators of `sparse.py` their CUDA implementation."""
    forward.register_kernel("cuda", _forward)
    input_gradient.register_kernel("cuda", _input_gradient)
    input_gradient_again.register_kernel("cuda", _input_gradient_again)
    weight_gradients.register_kernel("cuda", _weight_gradients)


@functools.cache
def _kernels(name: str) -> Any:
    """One of `csrc/binding.cpp`'s operators."""
    from megasparse.mlp import build

    build.load()
    return getattr(torch.ops.megasparse_kernels, name).default


def _launch(name: str, device: torch.device, *arguments: Any) -> Any:
    """Calls one of the operators on the current stream of a device."""
    with torch.cuda.device(device):
        return _kernels(name)(*arguments, torch.cuda.current_stream().cuda_stream)


def _forward(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    save: bool,
    capacity: int,
    main_w_in: Tensor | None,
    main_w_down: Tensor | None,
) -> list[Tensor]:
    mask = mask_by_sequence(token_mask, sequences)
    return _launch("forward", x.device, x, w_in, w_down, mask, order, sequences, save, capacity)


def _input_gradient(
    dy: Tensor,
    dl1: Tensor | None,
    x: Tensor | None,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    saved: list[Tensor],
) -> list[Tensor]:
    mask = mask_by_sequence(token_mask, sequences)
    return _launch("input_gradient", dy.device, dy, dl1, x, w_in, w_down, mask, order, sequences, saved)


def _input_gradient_again(
    dy: Tensor,
    dl1: Tensor | None,
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    sequences: int,
    saved: list[Tensor],
    dx: Tensor,
    h: Tensor,
    du: Tensor,
    dg: Tensor | None,
) -> None:
    mask = mask_by_sequence(token_mask, sequences)
    outputs = (dx, h, du, dg)
    _launch("input_gradient_again", dy.device, dy, dl1, x, w_in, w_down, mask, order, sequences, saved, *outputs)


def _weight_gradients(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    order: Tensor | None,
    sequences: int,
    pattern: list[Tensor],
    values: list[Tensor],
    main_w_in: Tensor | None,
    main_w_down: Tensor | None,
) -> tuple[Tensor, Tensor]:
    main_grads = (main_w_in, main_w_down)
    return _launch("weight_gradients", x.device, dy, x, w_in, w_down, order, sequences, pattern, values, *main_grads)
