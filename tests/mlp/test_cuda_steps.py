"""The backward in steps on the CUDA kernels: every bit as by autograd, whatever the saved buffers hold."""

import pytest

from tests.gpu import NEEDS_HOPPER
from tests.mlp.test_cuda import cuda_case, poison
from tests.mlp.test_steps import CAPACITIES, TOKENS, check

pytestmark = NEEDS_HOPPER


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(("path", "capacity"), [("dense", 0), *(("sparse", capacity) for capacity in CAPACITIES)])
def test_steps_are_autograd(path: str, capacity: int, late: bool, gated: bool, accumulate: bool) -> None:
    poison()
    case = cuda_case(TOKENS, 264, 712, gated, "sparse")
    check(case, path, late, accumulate, True, capacity * 712 // 70)
