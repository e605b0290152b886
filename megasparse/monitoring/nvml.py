"""A CUDA device as NVIDIA's management library, the driver's side of it, knows it."""

from __future__ import annotations

from typing import Any

import torch


def open_device(device: torch.device) -> tuple[Any, Any]:
    """The module `pynvml` and its handle of the device.

    Raises what they raise: ImportError, OSError without the driver's library, NVML's own errors.
    """
    import pynvml

    pynvml.nvmlInit()
    # By UUID: NVML's numbering ignores CUDA_VISIBLE_DEVICES.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
