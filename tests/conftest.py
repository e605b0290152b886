"""What tests in every folder may ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.commands import Commands


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """`megasparse` without the time that imports take."""
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def kernels() -> None:
    """On a GPU for them, kernels that do not build are a failure, not a reason to test the dense path."""
    import torch

    from megasparse.mlp import device_reason

    assert device_reason(torch.device("cuda"), torch.bfloat16, 64, 64) is None
