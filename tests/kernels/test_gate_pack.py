"""The gate product and its packing epilogue alone, against fp32 matrix products."""

import pytest
import torch
from torch import Tensor

from tests.gpu import NEEDS_HOPPER
from tests.kernels.library import address, library, poisoned, relative_error, sizes, sm_count, stream

pytestmark = NEEDS_HOPPER

SHAPES = [
    (0, 64, 64), (1, 64, 64), (7, 72, 704), (129, 2048, 1408), (4095, 512, 5640), (300, 8, 1),
    (513, 136, 5632), (130, 8192, 704), (256, 2048, 5632),
]  # fmt: skip


def run_gate(x: Tensor, weight: Tensor, order: Tensor | None, run_if: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mask words [Mp, W] and the arena [Mp, 64 W] of the kernel."""
    (m, d), h = x.shape, weight.shape[0]
    rows, words = (m + 127) // 128 * 128, (h + 63) // 64
    mask, arena = poisoned(rows, words, dtype=torch.int64), poisoned(rows, 64 * words)
    size = library().test_gate_workspace_bytes(*sizes(h, d), int(order is not None))
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda") if size else None
    status = library().test_gate(
        *map(address, (x, weight, order, workspace, mask, arena, run_if)), *sizes(m, d, h), sm_count(), stream()
    )
    assert status == 0
    torch.cuda.synchronize()
    return mask, arena


def unpack(mask: Tensor, arena: Tensor) -> tuple[Tensor, Tensor]:
    """Dense values and the mask's bits, both [Mp, 64 W]."""
    rows, words = mask.shape
    bits = (mask[..., None] >> torch.arange(64, device="cuda") & 1).bool()
    rank = (bits.int().cumsum(-1) - 1).clamp(min=0).long()
    values = arena.view(rows, words, 64).gather(2, rank)
    return values.masked_fill(~bits, 0).view(rows, 64 * words), bits.view(rows, 64 * words)


def check(x: Tensor, weight: Tensor, order: Tensor | None) -> Tensor:
    mask, arena = run_gate(x, weight, order)
    g, bits = unpack(mask, arena)
    m, h = x.shape[0], weight.shape[0]
    assert not bits[m:].any()
    assert not bits[:, h:].any()
    assert torch.equal(bits, g != 0)
    g = g[:m, :h].contiguous()
    expected = (x.float() @ (weight if order is None else weight[order.long()]).float().T).relu()
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isnan(g), torch.isnan(expected))
    assert torch.equal(torch.isposinf(g), torch.isposinf(expected))
    zero = torch.zeros((), device="cuda")
    assert relative_error(torch.where(finite, g.float(), zero), torch.where(finite, expected, zero)) < 3e-3
    again, _ = unpack(*run_gate(x, weight, order))
    assert torch.equal(g.view(torch.int16), again[:m, :h].contiguous().view(torch.int16)), "not repeatable"
    return g


def inputs(m: int, d: int, h: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(m, d, device="cuda").bfloat16()
    return x, (torch.randn(h, d, device="cuda") / d**0.5).bfloat16()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], ordered: bool) -> None:
    x, weight = inputs(*shape)
    check(x, weight, torch.randperm(shape[2], device="cuda").int() if ordered else None)


@pytest.mark.parametrize("shift", [-4.0, 4.0])
def test_nothing_or_everything_active(shift: float) -> None:
    x, weight = inputs(1000, 256, 1000)
    share = (check(x.abs() + 1, weight + shift, None) != 0).float().mean()
    assert share == (0 if shift < 0 else 1)


def test_nan_and_infinity() -> None:
    x, weight = inputs(1000, 256, 1000)
    x[500, 3], x[0, 0] = float("nan"), float("inf")
    g = check(x, weight, torch.randperm(1000, device="cuda").int())
    assert torch.isnan(g[500]).all()
    assert torch.isinf(g[0]).any()


def test_broken_weights_make_no_token_active_that_does_not_exist() -> None:
    x, weight = inputs(1000, 256, 1000)
    weight[17, 3], weight[400, 0] = float("nan"), float("inf")
    g = check(x, weight, None)
    assert torch.isnan(g[:, 17]).all()


def test_flag_turns_it_off() -> None:
    x, weight = inputs(300, 64, 256)
    mask, arena = run_gate(x, weight, None, torch.zeros((), dtype=torch.int32, device="cuda"))
    assert (mask == 0x5A5A5A5A).all()
    assert torch.isnan(arena).all()
    on, _ = run_gate(x, weight, None, torch.ones((), dtype=torch.int32, device="cuda"))
    assert torch.equal(on, run_gate(x, weight, None)[0])
