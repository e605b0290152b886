"""Triton kernels for what stands between the dense path's products on CUDA.

One pass over the activations each way. The forward kernel also counts the statistics of its block of 128
tokens, so that observing costs no further pass. Partial sums are stored per block and added afterwards in a
fixed order: bitwise repeatable, no atomics.
"""

from typing import Any

import torch
from torch import Tensor

from megasparse.mlp.types import TOKEN_TILE

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

BLOCK_H = 64

if AVAILABLE:

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        a, mask, h, l1_parts, count_parts, tile_fired,
        M, H, stride, blocks, sequences,
        GATED: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(1).to(tl.int64)
        block = tl.program_id(0)
        tiles = tl.num_programs(1) // sequences  # of each sequence
        rows = (tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)) * sequences + tile // tiles
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < M)[:, None] & (columns < H)[None, :]
        place = rows[:, None] * stride + columns[None, :]
        gate = tl.load(a + place, mask=inside, other=0.0)
        g = tl.where(gate <= 0, 0.0, gate.to(tl.float32))  # keeps NaN, as torch.relu does
        value = g
        if GATED:
            up = tl.load(a + place + H, mask=inside, other=0.0)
            value = g * up.to(tl.float32)
        stored = value.to(h.dtype.element_ty)
        tl.store(h + rows[:, None] * H + columns[None, :], stored, mask=inside)
        active = (g != 0) & inside
        counted = active
        magnitude = tl.abs(stored.to(tl.float32))
        if MASKED:
            counts = tl.load(mask + rows, mask=rows < M, other=0) != 0
            counted = active & counts[:, None]
            magnitude = tl.where(counts[:, None], magnitude, 0.0)
        index = tile * blocks + block
        tl.store(l1_parts + index, tl.sum(tl.sum(magnitude, 1), 0))
        tl.store(count_parts + index * 2, tl.sum(tl.sum(counted.to(tl.int32), 1), 0))
        union = tl.max(active.to(tl.int32), 0)
        tl.store(count_parts + index * 2 + 1, tl.sum(union, 0))
        # Bit 0: active for some token of the tile; bit 1: for some counted token.
        fired = union + 2 * tl.max(counted.to(tl.int32), 0)
        tl.store(tile_fired + tile * H + columns, fired.to(tl.int8), mask=columns < H)

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        a, dh, dl1, mask, h, da,
        M, H, stride,
        GATED: tl.constexpr, MASKED: tl.constexpr, HAS_L1: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < M)[:, None] & (columns < H)[None, :]
        place = rows[:, None] * stride + columns[None, :]
        here = rows[:, None] * H + columns[None, :]
        gate = tl.load(a + place, mask=inside, other=0.0)
        g = tl.where(gate <= 0, 0.0, gate.to(tl.float32))
        grad = tl.load(dh + here, mask=inside, other=0.0).to(tl.float32)
        value = g
        if GATED:
            up = tl.load(a + place + H, mask=inside, other=0.0).to(tl.float32)
            value = g * up
        stored = value.to(h.dtype.element_ty)
        tl.store(h + here, stored, mask=inside)
        if HAS_L1:
            signed = stored.to(tl.float32)
            sign = tl.where(signed > 0, 1.0, 0.0) - tl.where(signed < 0, 1.0, 0.0)
            if MASKED:
                counts = tl.load(mask + rows, mask=rows < M, other=0) != 0
                sign = tl.where(counts[:, None], sign, 0.0)
            grad += sign * tl.load(dl1).to(tl.float32)
        kind = da.dtype.element_ty
        if GATED:
            tl.store(da + place, tl.where(g == 0, 0.0, grad * up).to(kind), mask=inside)
            tl.store(da + place + H, (grad * g).to(kind), mask=inside)
        else:
            tl.store(da + place, tl.where(g == 0, 0.0, grad).to(kind), mask=inside)


def _grid(a: Tensor, hidden: int) -> tuple[int, int]:
    return triton.cdiv(hidden, BLOCK_H), triton.cdiv(a.shape[0], TOKEN_TILE)


def _options(a: Tensor, hidden: int, token_mask: Tensor | None) -> dict[str, Any]:
    return {
        "GATED": a.shape[1] != hidden, "MASKED": token_mask is not None,
        "BLOCK_M": TOKEN_TILE, "BLOCK_N": BLOCK_H, "num_warps": 8,
    }  # fmt: skip


def forward(
    a: Tensor, hidden: int, token_mask: Tensor | None, sequences: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same as `dense_elementwise.forward`, for a contiguous bf16 or fp32 CUDA tensor with M > 0."""
    blocks, tiles = grid = _grid(a, hidden)
    h = a.new_empty(a.shape[0], hidden)
    l1_parts = a.new_empty(tiles, blocks, dtype=torch.float32)
    count_parts = a.new_empty(tiles, blocks, 2, dtype=torch.int32)
    tile_fired = a.new_empty(tiles, hidden, dtype=torch.int8)
    mask = a if token_mask is None else token_mask.contiguous().view(torch.uint8)
    with torch.cuda.device(a.device):
        _forward_kernel[grid](
            a, mask, h, l1_parts, count_parts, tile_fired,
            a.shape[0], hidden, a.shape[1], blocks, sequences, **_options(a, hidden, token_mask),
        )  # fmt: skip
    counts = a.new_full((4,), tiles, dtype=torch.int64)
    counts[1:3] = count_parts.view(-1, 2).sum(0)
    fired = tile_fired.amax(0) > 1
    tile_counts = (tile_fired & 1).sum(0, dtype=torch.int32)
    if token_mask is None:
        counts[0].fill_(a.shape[0])
    else:
        counts[0] = token_mask.sum()
    return h, l1_parts.sum(), counts, fired, tile_counts


def backward(
    a: Tensor, hidden: int, dh: Tensor, dl1: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Same as `dense_elementwise.backward`, for contiguous bf16 or fp32 CUDA tensors with M > 0."""
    h, da = a.new_empty(dh.shape), torch.empty_like(a)
    mask = a if token_mask is None else token_mask.contiguous().view(torch.uint8)
    with torch.cuda.device(a.device):
        _backward_kernel[_grid(a, hidden)](
            a, dh, a if dl1 is None else dl1, mask, h, da,
            a.shape[0], hidden, a.shape[1], HAS_L1=dl1 is not None, **_options(a, hidden, token_mask),
        )  # fmt: skip
    return h, da
