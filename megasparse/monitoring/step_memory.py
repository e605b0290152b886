"""The memory of one training step on this rank's GPU, by what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megasparse.megatron.attention_graphs import AttentionGraphs


@dataclass(frozen=True)
class StepMemory:
    """Bytes. The last six are 0 without CUDA, where there are no allocator statistics."""

    weights: int
    gradients: int
    """Megatron's buffers, in which micro-batches add up."""
    optimizer: int
    """Main parameters and moments."""
    activations: int
    """Allocated between the start of the step and the end of the decoder's forward, at most; what CUDA graphs hold of
    them all the time included."""
    temporaries: int
    """The peak of the step above all that: logits and their gradient, or what a layer's backward needs at once."""
    other: int
    """Allocated at the start of the step and none of these: statistics, workspaces of libraries, batches."""
    peak: int
    """Peak of allocated bytes, without tensors of `elsewhere`."""
    reserved: int
    """What the allocator has of the GPU after the step: more than the peak by what it cannot use again, or keeps."""
    device: int
    """In use on the GPU after the step by whomever: `reserved`, this process' context, libraries, NCCL's buffers."""


def measure_step(
    chunks: Sequence[nn.Module],
    optimizer: Sequence[Tensor],
    step: Callable[[], Any],
    elsewhere: Iterable[Tensor] = (),
    graphs: AttentionGraphs | None = None,
) -> StepMemory:
    """Runs `step` once and measures it; call it first, so that buffers which stay are there.

    Args:
        chunks: this rank's GPTModel chunks, wrapped in Megatron's DistributedDataParallel.
        optimizer: tensors that the optimizer holds; those of the model among them count as weights.
        step: the training step.
        elsewhere: tensors of another model that lives on the same GPU.
        graphs: of this model, captured by now.
    """
    seen: set[int] = set()
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = _new_bytes(parameters, seen)
    gradients = _new_bytes((p.main_grad for p in parameters if hasattr(p, "main_grad")), seen)
    states = _new_bytes(optimizer, seen)
    if not torch.cuda.is_available():
        step()
        return StepMemory(weights, gradients, states, 0, 0, 0, 0, 0, 0)
    foreign = _new_bytes(elsewhere, seen)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    levels = [base]
    decoders = [m for chunk in chunks for m in chunk.modules() if type(m).__name__ == "TransformerBlock"]
    handles = [
        decoder.register_forward_hook(lambda *_: levels.append(torch.cuda.memory_allocated())) for decoder in decoders
    ]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = (graphs.allocated, graphs.reserved) if graphs is not None else (0, 0)
    return StepMemory(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        activations=max(levels) - base + reserved,
        temporaries=peak - max(levels),
        other=base - weights - gradients - states - foreign - allocated,
        peak=peak - foreign - allocated + reserved,
        reserved=torch.cuda.memory_reserved(),
        device=total - free,
    )


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages of `tensors` that are not in `seen`, and adds them to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
