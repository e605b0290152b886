"""Energy drawn by this rank's GPU, from the counter that NVIDIA's management library keeps."""

from __future__ import annotations

import logging

import torch

from megasparse.monitoring.nvml import open_device

logger = logging.getLogger(__name__)


class EnergyMeter:
    """Joules drawn since the last call, of the current CUDA device.

    `available` is False on CPU and where the driver keeps no counter (before Volta, MIG slices): then no energy
    metric is logged. The counter is the whole board's, in millijoules, and does not need the GPU to be idle.
    """

    def __init__(self) -> None:
        self._handle = None
        self._last = 0.0
        if not torch.cuda.is_available():
            return
        try:
            pynvml, handle = open_device(torch.device("cuda", torch.cuda.current_device()))
            self._last = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000.0
            self._pynvml, self._handle = pynvml, handle
        except Exception as error:  # a missing driver library raises OSError, NVML its own errors
            logger.warning("energy is not measured: the GPU's energy counter cannot be read (%s)", error)

    @property
    def available(self) -> bool:
        return self._handle is not None

    def read(self) -> float:
        """Joules since the last call or construction; 0 where not `available`."""
        if self._handle is None:
            return 0.0
        now = self._pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000.0
        joules, self._last = now - self._last, now
        return joules
