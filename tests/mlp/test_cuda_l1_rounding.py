"""As `test_l1_rounding.py`, on the GPU: CUDA kernels and the dense path's products and Triton kernels."""

import pytest

from tests.gpu import NEEDS_HOPPER
from tests.mlp.test_l1_rounding import check

pytestmark = NEEDS_HOPPER


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_l1_gradient_arrives(path: str, gated: bool) -> None:
    check(path, gated, "cuda")
