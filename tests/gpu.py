"""`pytestmark = NEEDS_HOPPER`: tests of the kernels, which are for GPUs of compute capability 9.0."""

import pytest
import torch


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "no GPU of compute capability 9.0"
    return None


NEEDS_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(_why_not() is not None, reason=str(_why_not())),
    pytest.mark.usefixtures("kernels"),
]
