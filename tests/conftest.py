"""What tests in every folder may ask for."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def kernels() -> None:
    """On a GPU for them, kernels that do not build are a failure, not a reason to test the dense path."""
    import torch

    from megasparse.mlp import device_reason

    assert device_reason(torch.device("cuda"), torch.bfloat16, 64, 64) is None
