"""The MLP of a few tokens (decoding) in Triton: reads all gate rows, but up and down rows of active neurons alone.

With up to 64 tokens a product takes as long as its weights take to be read, so what is not read is what is won: of
3 H D weights, H D plus 2 D for every neuron that any of the tokens uses. Three kernels:

    gate_up   a program for BLOCK_H neurons: g = relu(x Wg^T); u = x Wu^T over the rows whose g is not all zero; h
    down      a program for BLOCK_D columns and one of `splits` ranges of neurons: h W_down over rows whose h is not
              all zero, into a fp32 partial sum
    add       adds the partial sums in order

Exact for every pattern: a row that is not read would be multiplied by zeros. bf16 in and out, fp32 accumulation, g, u
and h rounded to bf16 as the dense path rounds them; bitwise repeatable; no host synchronisation, so it can be captured
in a CUDA graph, and torch.compile traces into it. Forward only.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

MAX_TOKENS = 64

if AVAILABLE:

    @triton.jit
    def _gate_up_kernel(  # type: ignore[no-untyped-def]
        x, w_in, h, M, H, D: tl.constexpr,
        GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        rows = tl.arange(0, BLOCK_M)
        neurons = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = neurons < H
        x_row = x + rows[:, None] * D
        w_row = w_in + neurons.to(tl.int64)[None, :] * D
        gate = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(x_row + k[None, :], mask=(rows < M)[:, None] & (k < D)[None, :], other=0.0)
            b = tl.load(w_row + k[:, None], mask=inside[None, :] & (k < D)[:, None], other=0.0)
            gate = tl.dot(a, b, gate)
        rounded = gate.to(h.dtype.element_ty).to(tl.float32)
        g = tl.where(rounded <= 0, 0.0, rounded)  # keeps NaN, as torch.relu does
        value = g
        if GATED:
            active = tl.max((g != 0).to(tl.int32), 0) > 0
            if tl.max(active.to(tl.int32), 0) > 0:
                up = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
                up_row = w_in + (H + neurons).to(tl.int64)[None, :] * D
                for start in range(0, D, BLOCK_K):
                    k = start + tl.arange(0, BLOCK_K)
                    a = tl.load(x_row + k[None, :], mask=(rows < M)[:, None] & (k < D)[None, :], other=0.0)
                    b = tl.load(up_row + k[:, None], mask=active[None, :] & (k < D)[:, None], other=0.0)
                    up = tl.dot(a, b, up)
                # Not 0 * u where g is 0: an infinite u there is skipped as on every sparse path.
                value = tl.where(g != 0, g * up.to(h.dtype.element_ty).to(tl.float32), 0.0)
        place = h + rows[:, None] * H + neurons[None, :]
        tl.store(place, value.to(h.dtype.element_ty), mask=(rows < M)[:, None] & inside[None, :])

    @triton.jit
    def _down_kernel(  # type: ignore[no-untyped-def]
        h, w_down, partial, M, H, D: tl.constexpr,
        RANGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        rows = tl.arange(0, BLOCK_M)
        columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.program_id(1) * RANGE
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, RANGE, BLOCK_K):
            neurons = first + start + tl.arange(0, BLOCK_K)
            a = tl.load(
                h + rows[:, None] * H + neurons[None, :], mask=(rows < M)[:, None] & (neurons < H)[None, :], other=0.0
            )
            active = tl.max((a != 0).to(tl.int32), 0) > 0
            place = w_down + neurons.to(tl.int64)[:, None] * D + columns[None, :]
            b = tl.load(place, mask=active[:, None] & (columns < D)[None, :], other=0.0)
            total = tl.dot(a, b, total)
        out = partial + (tl.program_id(1) * M + rows[:, None]) * D + columns[None, :]
        tl.store(out, total, mask=(rows < M)[:, None] & (columns < D)[None, :])

    @triton.jit
    def _add_kernel(  # type: ignore[no-untyped-def]
        partial, y, numbers, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(partial + split * numbers + place, mask=place < numbers, other=0.0)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=place < numbers)


def decode_mlp(x: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """y [M, D] of `sparse_mlp` for 1 to 64 tokens, without gradients and statistics.

    Args:
        x: bf16 [M, D], contiguous, on CUDA, M from 1 to `MAX_TOKENS`.
        w_in: bf16 [2 H, D] (gate, then up) or [H, D] (non-gated), contiguous.
        w_down: bf16 [H, D], contiguous.

    Where several GPUs are visible, the current device must be x's.
    """
    tokens, width = x.shape
    hidden = w_down.shape[0]
    block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    block_h = 16 if tokens <= 16 else 32
    h = x.new_empty(tokens, hidden)
    _gate_up_kernel[(triton.cdiv(hidden, block_h),)](
        x, w_in, h, tokens, hidden, width,
        GATED=w_in.shape[0] != hidden, BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_K=256 if tokens <= 16 else 128,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    neurons = 256 if tokens <= 16 else 512 if tokens <= 32 else 1024
    block_d = 128 if tokens <= 16 else 64
    splits = triton.cdiv(hidden, neurons)
    partial = x.new_empty(splits, tokens, width, dtype=torch.float32)
    _down_kernel[(triton.cdiv(width, block_d), splits)](
        h, w_down, partial, tokens, hidden, width,
        RANGE=neurons, BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_K=128,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    y = torch.empty_like(x)
    _add_kernel[(triton.cdiv(tokens * width, 256),)](
        partial, y, tokens * width, SPLITS=splits, BLOCK=256, num_warps=4
    )  # fmt: skip
    return y
