"""Weight gradients against fp64: every size, pattern and output, gated or not, bitwise repeatable."""

import pytest
import torch

from tests.gpu import NEEDS_HOPPER
from tests.kernels.cases import PATTERNS, SIZES, active_positions, normal
from tests.kernels.gathered import wgrad
from tests.kernels.packed import Packed
from tests.mlp.patterns import relative_error

pytestmark = NEEDS_HOPPER

BF16, FP32, FP32_ADDED = range(3)
FP32_SUM = 1e-5  # relative error of fp32 sums of up to 4095 products in the tensor cores


@pytest.mark.parametrize("output", [BF16, FP32, FP32_ADDED])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("m", "h", "d"), [(0, 704, 64), *SIZES])
def test_against_fp64(m: int, h: int, d: int, pattern: str, gated: bool, output: int) -> None:
    torch.manual_seed(0)
    packed = Packed(active_positions(m, h, pattern) if m else torch.zeros(0, h, dtype=torch.bool, device="cuda"))
    order = torch.randperm(h, device="cuda").to(torch.int32) if pattern != "half" else None
    rows = torch.arange(h, device="cuda") if order is None else order.long()
    dg, du, hidden = (normal(m, h) * packed.active[:m, :h] for _ in range(3))
    x, dy = normal(m, d), normal(m, d)
    expected_in = torch.zeros(2 * h if gated else h, d, dtype=torch.float64, device="cuda")
    expected_down = torch.zeros(h, d, dtype=torch.float64, device="cuda")
    if gated:
        expected_in[rows] = dg.double().t() @ x.double()
    expected_in[rows + (h if gated else 0)] = du.double().t() @ x.double()
    expected_down[rows] = hidden.double().t() @ dy.double()

    dtype = torch.bfloat16 if output == BF16 else torch.float32
    initial = [torch.full(e.shape, float("nan"), dtype=dtype, device="cuda") for e in (expected_in, expected_down)]
    if output == FP32_ADDED:
        initial = [torch.randn_like(value) for value in initial]
        expected_in, expected_down = expected_in + initial[0], expected_down + initial[1]
    results = []
    for _ in range(2):
        dw_in, dw_down = (value.clone() for value in initial)
        wgrad(packed, (dg if gated else None, du, hidden), x, dy, order, dw_in, dw_down, output)
        results.append((dw_in, dw_down))
    for value, again, expected in zip(*results, (expected_in, expected_down), strict=True):
        rounding = relative_error(expected.bfloat16(), expected) if output == BF16 else 0.0
        assert relative_error(value, expected) <= 1.01 * rounding + FP32_SUM
        assert torch.equal(value, again)


def test_cut_tiles_are_added_up_in_a_fixed_order() -> None:
    """A few hot neurons only: their tiles' tokens are cut into chunks, and chunks finish in any order."""
    torch.manual_seed(0)
    m, h, d = 16384, 704, 1024
    active = torch.zeros(m, h, dtype=torch.bool, device="cuda")
    active[:, :5] = True
    packed = Packed(active)
    dg, du, hidden = (normal(m, h) * active for _ in range(3))
    x, dy = normal(m, d), normal(m, d)
    results = []
    for _ in range(5):
        dw_in = torch.full((2 * h, d), float("nan"), device="cuda")
        dw_down = torch.full((h, d), float("nan"), device="cuda")
        wgrad(packed, (dg, du, hidden), x, dy, None, dw_in, dw_down, FP32)
        results.append((dw_in, dw_down))
    expected = torch.cat([dg.double().t() @ x.double(), du.double().t() @ x.double()])
    assert relative_error(results[0][0], expected) < 2e-5  # fp32 sums over 16384 tokens
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
