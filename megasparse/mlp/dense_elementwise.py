"""What the dense path computes between its products, with the statistics every path returns.

PyTorch operations here; one Triton kernel each way on CUDA (`dense_triton.py`), where they would otherwise
cost as much as a product.
"""

import torch
from torch import Tensor

from megasparse.mlp.types import TOKEN_TILE


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the L1 sum for activations of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(a: Tensor, hidden: int) -> tuple[Tensor, Tensor | None]:
    """The gate's and the up product's columns of a [M, 2 H]; (a, None) where there is no gate."""
    return (a[:, :hidden], a[:, hidden:]) if a.shape[1] != hidden else (a, None)


def _triton_applies(a: Tensor) -> bool:
    if not a.is_cuda or a.dtype == torch.float64 or a.numel() == 0:
        return False
    from megasparse.mlp import dense_triton

    return dense_triton.AVAILABLE


def forward(
    a: Tensor, hidden: int, token_mask: Tensor | None, sequences: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a [M, 2 H] or [M, H] -> h [M, H], l1 [], then as `statistics`."""
    if _triton_applies(a):
        from megasparse.mlp import dense_triton

        return dense_triton.forward(a, hidden, token_mask, sequences)
    gate, up = split(a, hidden)
    g = torch.relu(gate)
    h = g if up is None else g * up
    l1_rows = h.abs().sum(1, dtype=sum_dtype(a.dtype))
    if token_mask is not None:
        l1_rows = l1_rows.masked_fill(~token_mask, 0)
    return h, l1_rows.sum(), *statistics(g != 0, token_mask, sequences)


def statistics(active: Tensor, token_mask: Tensor | None, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """active bool [M, H] -> counts int64 [4] (tokens, active, union, tiles), fired, tile_counts.

    Tiles are 128 positions of one of the `sequences` (`tiled_sequences`), rows position after position.
    """
    tokens, hidden = active.shape
    tiles = -(-tokens // TOKEN_TILE)
    padded = torch.nn.functional.pad(active, (0, 0, 0, tiles * TOKEN_TILE - tokens))
    by_tile = padded.view(tiles // sequences, TOKEN_TILE, sequences, hidden)
    tile_active = by_tile.any(1).view(tiles, hidden)
    counted = active if token_mask is None else active & token_mask.unsqueeze(1)
    fired = tile_active.any(0) if token_mask is None else counted.any(0)
    number = active.new_full((), tokens, dtype=torch.int64) if token_mask is None else token_mask.sum()
    tile_counts = tile_active.sum(0, dtype=torch.int32)
    counts = torch.stack([number, counted.sum(), tile_counts.sum(), active.new_full((), tiles, dtype=torch.int64)])
    return counts, fired, tile_counts


def backward(
    a: Tensor, hidden: int, dh: Tensor, dl1: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [M, H] again, and da like a, from dh [M, H] (of a's type or fp32) and the gradient of the L1 sum."""
    if _triton_applies(a):
        from megasparse.mlp import dense_triton

        return dense_triton.backward(a, hidden, dh, dl1, token_mask)
    gate, up = split(a, hidden)
    g = torch.relu(gate)
    h = g if up is None else g * up
    if dl1 is not None:
        sign = torch.sign(h)
        if token_mask is not None:
            sign = sign.masked_fill(~token_mask.unsqueeze(1), 0)
        wide = sum_dtype(a.dtype)  # rounded once, in da
        dh = dh.to(wide) + sign.to(wide) * dl1
    inactive = g == 0
    if up is None:
        return h, dh.masked_fill(inactive, 0).to(a.dtype)
    da = torch.empty_like(a)
    torch.mul(dh, up, out=da[:, :hidden]).masked_fill_(inactive, 0)
    torch.mul(dh, g, out=da[:, hidden:])
    return h, da
