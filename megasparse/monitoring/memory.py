"""Memory: the bytes that each MLP keeps for its backward, its peak, and the peaks of the process.

Saved bytes come from `torch.autograd.graph.saved_tensors_hooks` around the MLP's forward on sampled steps: a storage
counts once, however many tensors view it; parameters and buffers of the MLP do not count, since they live anyway.

Where a layer is recomputed (Megatron's checkpointing), its first forward runs without autograd and saves nothing;
what the recomputing forward saves is then counted, once: it lies in memory until that layer's backward is done.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

_PROCESS = psutil.Process()


@dataclass(frozen=True)
class LayerMemory:
    """Of one micro-batch of one layer on this rank."""

    saved_bytes: int
    peak_bytes: int
    """CUDA: how far allocated memory rose above its level at entry while the MLP's forward or backward ran, whichever
    rose more. CPU (no allocator statistics): saved bytes and output, a lower bound."""


class PeakMemory:
    """Peak allocated and reserved bytes of this rank's GPU since the last `read`, through any resets in between."""

    def __init__(self) -> None:
        self._allocated = 0
        self._reserved = 0

    def keep_and_reset(self) -> None:
        """Remember the peaks so far and start new ones."""
        self._allocated = max(self._allocated, torch.cuda.max_memory_allocated())
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def read(self) -> tuple[int, int]:
        """(allocated, reserved) bytes; (0, 0) without CUDA. Starts a new window."""
        if not torch.cuda.is_available():
            return 0, 0
        self.keep_and_reset()
        result = self._allocated, self._reserved
        self._allocated = self._reserved = 0
        return result


def resident_bytes() -> tuple[int, int]:
    """(now, peak so far) resident set size of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    now = _PROCESS.memory_info().rss
    return now, max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class _Watch:
    """Hooks on one MLP; measures its first call with autograd on."""

    def __init__(self, module: nn.Module, peak: PeakMemory) -> None:
        self._module, self._peak = module, peak
        self._context: torch.autograd.graph.saved_tensors_hooks | None = None
        self._own: set[int] = set()
        self._storages: dict[int, int] = {}
        self._level = 0
        self.saved_bytes: int | None = None
        self.peak_bytes = 0
        self._handles = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.saved_bytes is not None or self._context is not None or not torch.is_grad_enabled():
            return
        own = [*self._module.parameters(), *self._module.buffers()]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._start()
        self._context = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._context.__enter__()

    def _pack(self, tensor: Tensor) -> Tensor:
        self._count(tensor, self._storages)
        return tensor

    def _count(self, tensor: Tensor, into: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            into[storage.data_ptr()] = storage.nbytes()

    def _leave(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._context is None:
            return
        self._context.__exit__(None, None, None)
        self._context = None
        self.saved_bytes = sum(self._storages.values())
        self._stop()
        outputs = [item for item in (output if isinstance(output, tuple) else (output,)) if isinstance(item, Tensor)]
        if not torch.cuda.is_available():
            held = dict(self._storages)
            for tensor in outputs:
                self._count(tensor, held)
            self.peak_bytes = sum(held.values())
            return
        # The MLP's backward runs between the gradient of its output and that of its input.
        if outputs and outputs[0].requires_grad:
            outputs[0].register_hook(lambda _gradient: self._start())
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
                inputs[0].register_hook(lambda _gradient: self._stop())

    def _start(self) -> None:
        if torch.cuda.is_available():
            self._peak.keep_and_reset()
            self._level = torch.cuda.memory_allocated()

    def _stop(self) -> None:
        if torch.cuda.is_available():
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - self._level)


class LayerMemoryProbe:
    """Samples `LayerMemory` of every MLP of this rank during one step: `arm` before it, `collect` after it."""

    def __init__(self, mlps: Sequence[nn.Module], peak: PeakMemory) -> None:
        self._mlps, self._peak = list(mlps), peak
        self._watches: list[_Watch] = []

    def arm(self) -> None:
        self.collect()
        self._watches = [_Watch(mlp, self._peak) for mlp in self._mlps]

    def collect(self) -> list[LayerMemory] | None:
        """One entry for each MLP, in order; None where not armed or an MLP had no call with autograd on."""
        for watch in self._watches:
            watch.remove()
        result = [
            LayerMemory(watch.saved_bytes, watch.peak_bytes) for watch in self._watches if watch.saved_bytes is not None
        ]
        armed, self._watches = len(self._watches), []
        return result if armed and len(result) == armed else None
