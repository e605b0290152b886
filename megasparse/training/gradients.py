"""What follows the backward: gradients summed over the replicas and divided by the number of counted tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads


def finish_gradients(model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Megatron's `finalize_model_grads` with the division on the device.

    Megatron's own asks on the host whether any token was counted, and so waits there for the whole backward: the data
    of the next step would be read and the update launched while the GPU has nothing to do.

    Args:
        model: DDP-wrapped chunks of this rank.
        num_tokens: int [], counted tokens of this replica's batch, there on the last pipeline stage (overwritten).
        options: of `finalize_model_grads`.
    """
    finalize_model_grads(model, None, **options)
    if num_tokens is None:
        return
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() > 1:
        dist.broadcast(num_tokens, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    scale = 1.0 / num_tokens.clamp(min=1)  # where no token counts the gradients are zero
    # As `chunk.scale_gradients`, whose product with a number on the device takes a fifth longer.
    torch._foreach_mul_([buffer.grad_data for chunk in model for buffer in chunk.buffers], scale)
