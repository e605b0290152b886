"""The backward in steps on the CUDA kernels: every bit as by autograd, whatever the saved buffers hold."""

import pytest
import torch

from megasparse.mlp import device_reason
from tests.mlp.test_cuda import REASON, cuda_case, poison
from tests.mlp.test_steps import CAPACITIES, TOKENS, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    assert device_reason(torch.device("cuda"), torch.bfloat16, 64, 64) is None


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(("path", "capacity"), [("dense", 0), *(("sparse", capacity) for capacity in CAPACITIES)])
def test_steps_are_autograd(path: str, capacity: int, late: bool, gated: bool, accumulate: bool) -> None:
    poison()
    case = cuda_case(TOKENS, 264, 712, gated, "sparse")
    check(case, path, late, accumulate, True, capacity * 712 // 70)
