"""The part of a step that is this rank's own: from its start to its gradients.

What follows, the reduction over the replicas, takes the same time on every rank, as all wait for the slowest. With
pipeline or tensor parallelism the ranks of one replica wait for each other before that, and share a time.
"""

from __future__ import annotations

import time

import torch


class OwnTime:
    """A stopwatch on the device's clock: `start`, `stop`, and after the step, `seconds`. Waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, index: int) -> None:
        if self._cuda:
            self._events[index].record()
        else:
            self._times[index] = time.perf_counter()

    def seconds(self) -> float:
        """Of the last step; call it when something after `stop` has been read from the device."""
        if self._cuda:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._times[1] - self._times[0]
