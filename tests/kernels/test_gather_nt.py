"""Tokens times gathered weight rows alone: all four epilogues against fp32 products on the same union columns."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.gpu import NEEDS_HOPPER
from tests.kernels.library import address, library, poisoned, relative_error, sizes, sm_count, stream

pytestmark = NEEDS_HOPPER

UP, UP_ONLY, DH, DH_PLAIN = range(4)
ROUNDED_TWICE = 5e-3  # relative error of values that were rounded to bf16 two times
L1_GRAD = 0.37

CASES = [
    (128, 64, 64, 1.0), (128, 64, 256, 0.1), (256, 2048, 1408, 0.02), (1, 64, 64, 0.5), (7, 72, 704, 0.3),
    (129, 2048, 1408, 0.05), (4095, 512, 5640, 0.02), (300, 8, 5, 0.5), (130, 8192, 704, 0.05),
    (300, 64, 5632, 1.0), (1000, 128, 512, 0.0), (777, 64, 5632, 0.001),
]  # fmt: skip


def swizzled(blocks: Tensor) -> Tensor:
    """[B, 128, 64] to the image of compact blocks, or back."""
    row, chunk = torch.arange(128, device="cuda")[:, None] & 7, torch.arange(8, device="cuda")
    index = (chunk ^ row)[None, :, :, None].expand(len(blocks), 128, 8, 8)
    return blocks.reshape(len(blocks), 128, 8, 8).gather(2, index).view(len(blocks), 128, 64).contiguous()


@dataclass
class Pattern:
    """The lists that the kernels take, of a gate activation g [M, H] in position order."""

    union_idx: Tensor
    union_count: Tensor
    row_ptr: Tensor
    base: Tensor
    blocks: Tensor  # [B, 128, 64] values of g
    columns: Tensor  # [B, 64] positions, -1 = padding
    tile: Tensor  # [B]
    position: Tensor  # [B, 128, 64] index of active elements among the packed values


def make_pattern(g: Tensor) -> Pattern:
    m, h = g.shape
    rows, width = (m + 127) // 128 * 128, (h + 63) // 64 * 64
    tiles = rows // 128
    padded = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    padded[:m, :h] = g
    union = (padded != 0).view(tiles, 128, width).any(1)
    count = union.sum(1)
    blocks = (count + 63) // 64
    idx = torch.argsort((~union).to(torch.uint8), dim=1, stable=True)
    place = torch.arange(width, device="cuda")
    idx = torch.where(place < count[:, None], idx, torch.where(place < 64 * blocks[:, None], -1, 0x7FFFFFFF)).int()
    tile = torch.repeat_interleave(torch.arange(tiles, device="cuda"), blocks)
    first = (blocks.cumsum(0) - blocks)[tile]
    columns = idx.view(tiles, width // 64, 64)[tile, torch.arange(len(tile), device="cuda") - first].long()
    token = torch.arange(128, device="cuda")[None, :, None]
    values = padded.view(tiles, 128, width)[tile[:, None, None], token, columns.clamp(min=0)[:, None, :]]
    values = values.masked_fill((columns < 0)[:, None, :], 0)
    row_ptr = torch.zeros(rows + 1, dtype=torch.int64, device="cuda")
    row_ptr[1:] = (padded != 0).sum(1).cumsum(0)
    in_block = (values != 0).sum(2)
    before = in_block.cumsum(0) - in_block
    base = before - before[first]
    position = row_ptr[:-1].view(tiles, 128)[tile][..., None] + base[..., None] + (values != 0).cumsum(2) - 1
    return Pattern(idx.contiguous(), count.int(), row_ptr, base.short().contiguous(), values, columns, tile, position)


class Launch:
    """One call and what it wrote; `g` and `u` are the compact buffers, as [B, 128, 64]."""

    def __init__(
        self, mode: int, a: Tensor, weight: Tensor, order: Tensor | None, pattern: Pattern, *,
        u: Tensor | None = None, l1_grad: Tensor | None = None, token_mask: Tensor | None = None,
        capacity: int | None = None, run_if: Tensor | None = None,
    ) -> None:  # fmt: skip
        (m, d), h = a.shape, weight.shape[0]
        total = int(pattern.row_ptr[-1])
        plan = poisoned(library().test_gather_nt_plan_bytes(*sizes(m, h)) // 4, dtype=torch.int32)
        assert library().test_gather_nt_plan(address(pattern.union_count), *sizes(m, h), address(plan), stream()) == 0
        g_compact = swizzled(pattern.blocks)
        u_compact = torch.full_like(g_compact, float("nan")) if u is None else swizzled(u)
        self.u_packed, self.dg, self.du, self.h = (poisoned(max(total, 1)) for _ in range(4))
        partials = poisoned(library().test_gather_nt_partials(*sizes(m, h)), dtype=torch.float32)
        pointers = (
            a, weight, order, pattern.union_idx, pattern.union_count, plan, pattern.row_ptr, pattern.base,
            g_compact, u_compact, self.u_packed, self.dg, self.du, self.h, l1_grad, token_mask, partials, run_if,
        )  # fmt: skip
        status = library().test_gather_nt(
            mode, (ctypes.c_void_p * len(pointers))(*(address(pointer).value for pointer in pointers)),
            *sizes(total if capacity is None else capacity, m, d, h), sm_count(), stream(),
        )  # fmt: skip
        assert status == 0
        torch.cuda.synchronize()
        self.g, self.u = swizzled(g_compact), swizzled(u_compact)
        self.l1_partials = partials[: int(plan[0]) * library().test_gather_nt_partials_per_unit()]

    def bits(self) -> list[Tensor]:
        return [tensor.view(torch.int16) for tensor in (self.g, self.u, self.u_packed, self.dg, self.du, self.h)]


def products(a: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    """fp32 products [B, 128, 64] with weight rows in position order; zero in padding columns."""
    m, d = a.shape
    tiles = torch.zeros((m + 127) // 128 * 128, d, device="cuda")
    tiles[:m] = a.float()
    result = torch.zeros(pattern.blocks.shape, device="cuda")
    for start in range(0, len(result), 256):
        part = slice(start, start + 256)
        columns = pattern.columns[part]
        rows = weight.float()[columns.clamp(min=0)] * (columns >= 0)[..., None]
        result[part] = torch.bmm(tiles.view(-1, 128, d)[pattern.tile[part]], rows.transpose(1, 2))
    return result


def random_gate(m: int, h: int, density: float) -> Tensor:
    """Non-negative values; neurons differ much in how often they fire."""
    share = torch.rand(1, h, device="cuda") ** 8 * density * 9 if 0 < density < 1 else density
    return (torch.rand(m, h, device="cuda") + 0.01).bfloat16() * (torch.rand(m, h, device="cuda") < share)


@pytest.mark.parametrize("plain", [False, True], ids=["order and mask", "neither"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_epilogues(case: tuple[int, int, int, float], plain: bool) -> None:
    m, d, h, density = case
    torch.manual_seed(m + h)
    x, dy = (torch.randn(m, d, device="cuda").bfloat16() for _ in range(2))
    weight = (torch.randn(h, d, device="cuda") / d**0.5).bfloat16()
    order = None if plain else torch.randperm(h, device="cuda").int()
    ordered = weight if order is None else weight[order.long()]
    token_mask = None if plain else torch.rand(m, device="cuda") < 0.8
    pattern = make_pattern(random_gate(m, h, density))
    active, g = pattern.blocks != 0, pattern.blocks.float()
    counted = torch.zeros((m + 127) // 128 * 128, dtype=torch.bool, device="cuda")
    counted[:m] = True if token_mask is None else token_mask
    counted = counted.view(-1, 128)[pattern.tile][..., None]
    position = pattern.position[active]
    total = int(pattern.row_ptr[-1])

    u = products(x, ordered, pattern) * active
    up = Launch(UP, x, weight, order, pattern, token_mask=token_mask)
    assert not torch.isnan(up.u_packed[:total]).any()
    assert relative_error(up.g, g * u) < ROUNDED_TWICE
    assert torch.equal(up.g[active], (g[active] * up.u_packed[position].float()).bfloat16())
    assert not up.g[~active].any()
    expected_l1 = (up.g.double().abs() * counted).sum()
    torch.testing.assert_close(up.l1_partials.double().sum(), expected_l1, rtol=1e-5, atol=0)
    again = Launch(UP, x, weight, order, pattern, token_mask=token_mask)
    for first, second in zip(up.bits(), again.bits(), strict=True):
        assert torch.equal(first, second), "not repeatable"

    only = Launch(UP_ONLY, x, weight, order, pattern)
    assert torch.equal(only.g, pattern.blocks)
    assert not only.u[~active].any()
    assert torch.equal(only.u[active], up.u_packed[position])

    half = Launch(UP, x, weight, order, pattern, capacity=total // 2)
    assert torch.equal(half.u_packed[: total // 2], up.u_packed[: total // 2])
    assert torch.isnan(half.u_packed[total // 2 :]).all()
    assert torch.equal(half.g, up.g)

    l1_grad = torch.tensor(L1_GRAD, device="cuda")
    hidden = (g * only.u.nan_to_num().float()).bfloat16()
    dh = products(dy, ordered, pattern) + L1_GRAD * torch.sign(hidden.float()) * counted
    back = Launch(DH, dy, weight, order, pattern, u=only.u, l1_grad=l1_grad, token_mask=token_mask)
    assert relative_error(back.g, dh * only.u.float()) < ROUNDED_TWICE
    assert relative_error(back.u, dh * g) < ROUNDED_TWICE
    for packed, compact in ((back.dg, back.g), (back.du, back.u), (back.h, hidden)):
        assert torch.equal(packed[position], compact[active])
        assert not torch.isnan(packed[:total]).any()

    back = Launch(DH_PLAIN, dy, weight, order, pattern, l1_grad=l1_grad, token_mask=token_mask)
    expected = (products(dy, ordered, pattern) + L1_GRAD * counted) * active
    assert relative_error(back.g, expected) < ROUNDED_TWICE
    assert torch.equal(back.du[position], back.g[active])
    assert torch.equal(back.h[position], pattern.blocks[active])


def test_flag_turns_it_off() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 64, device="cuda").bfloat16(), torch.randn(256, 64, device="cuda").bfloat16()
    pattern = make_pattern(random_gate(300, 256, 0.2))
    off = Launch(UP, x, weight, None, pattern, run_if=torch.zeros((), dtype=torch.int32, device="cuda"))
    assert torch.equal(off.g, pattern.blocks)
    assert torch.isnan(off.u_packed).all()
    assert torch.isnan(off.l1_partials).all()


def test_nan_stays_in_its_row() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 64, device="cuda").bfloat16(), torch.randn(256, 64, device="cuda").bfloat16()
    x[200] = float("nan")
    gate = random_gate(300, 256, 0.2)
    gate[200] = float("nan")
    pattern = make_pattern(gate)
    up = Launch(UP, x, weight, None, pattern)
    broken = torch.isnan(up.g)
    assert broken[pattern.tile == 1, 72].sum() == 256
    assert broken.sum() == 256
