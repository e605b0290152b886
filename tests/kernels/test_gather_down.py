"""down and dx against fp64: every size, every pattern, with and without an order, bitwise repeatable."""

import pytest
import torch

from tests.gpu import NEEDS_HOPPER
from tests.kernels.cases import PATTERNS, SIZES, active_positions, normal
from tests.kernels.gathered import gather_down
from tests.kernels.packed import Packed
from tests.mlp.patterns import relative_error

pytestmark = NEEDS_HOPPER


@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("m", "h", "d"), SIZES)
def test_against_fp64(m: int, h: int, d: int, pattern: str, products: int) -> None:
    torch.manual_seed(0)
    packed = Packed(active_positions(m, h, pattern))
    order = torch.randperm(h, device="cuda").to(torch.int32) if pattern != "half" else None
    rows = torch.arange(h, device="cuda") if order is None else order.long()
    pairs = [(normal(m, h) * packed.active[:m, :h], normal(h, d, scale=d**-0.5)) for _ in range(products)]
    out, again = normal(m, d), normal(m, d)
    gather_down(packed, pairs, order, out)
    gather_down(packed, pairs, order, again)
    expected = torch.zeros(m, d, dtype=torch.float64, device="cuda")
    for dense, weight in pairs:
        expected += dense.double() @ weight[rows].double()
    # One rounding to bf16: no worse than rounding the exact result, but for fp32 sums.
    rounding = relative_error(expected.bfloat16(), expected)
    assert relative_error(out, expected) <= 1.01 * rounding + 1e-5
    assert torch.equal(out, again)


def test_weights_of_inactive_neurons_do_not_matter() -> None:
    packed = Packed(active_positions(300, 704, "sparse"))
    dense, weight = normal(300, 704) * packed.active[:300, :704], normal(704, 256)
    inactive = ~packed.active[:, :704].any(0)
    assert inactive.any()
    out = normal(300, 256)
    gather_down(packed, [(dense, weight)], None, out)
    weight[inactive] = float("nan")
    again = normal(300, 256)
    gather_down(packed, [(dense, weight)], None, again)
    assert torch.equal(out, again)
