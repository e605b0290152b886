"""The norm of the gradient in one pass and one read, where Megatron-Core has no fused function for it.

Without Transformer Engine and Apex, and with a Transformer Engine that lacks one of the functions it asks for (2.11 for
0.19), Megatron takes the norm of every parameter's gradient by itself and reads each on the host: hundreds of waits for
the GPU a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor


def prepare_grad_norm() -> None:
    """Replace Megatron's own function, and without a GPU what it found installed. Call it before training."""
    if not torch.cuda.is_available() or clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
        clip_grads.l2_norm_impl = _norm


def _norm(_chunk: int, _noop: Tensor, lists: Sequence[Sequence[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Megatron's signature: one list of tensors -> (their norm, fp32 [1], norms of each: not asked for)."""
    [gradients] = lists
    return torch.nn.utils.get_total_norm(gradients).view(1), None
