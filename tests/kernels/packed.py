"""A pattern of active positions in the kernels' packed format (csrc/README.md), made with PyTorch for tests."""

import torch
from torch import Tensor

TILE = 128
WORD = 64


class Packed:
    """`active`: bool [M, H] by position, on the GPU. Buffers carry the names of csrc/README.md."""

    def __init__(self, active: Tensor) -> None:
        tokens, hidden = active.shape
        device = active.device
        self.m, self.h = tokens, hidden
        self.tiles, self.words = -(-tokens // TILE), -(-hidden // WORD)
        self.active = torch.zeros(self.tiles * TILE, self.words * WORD, dtype=torch.bool, device=device)
        self.active[:tokens, :hidden] = active
        by_word = self.active.view(self.tiles * TILE, self.words, WORD)
        bits = torch.ones(WORD, dtype=torch.int64, device=device) << torch.arange(WORD, device=device)
        self.mask = torch.stack([(by_word[:, w].long() * bits).sum(-1) for w in range(self.words)], 1).contiguous()
        counts = by_word.sum(-1)
        self.offset = (counts.cumsum(1) - counts).to(torch.int32).to(torch.int16).contiguous()
        self.row_ptr = torch.zeros(len(self.active) + 1, dtype=torch.int64, device=device)
        self.row_ptr[1:] = counts.sum(1).cumsum(0)
        union = self.active.view(self.tiles, TILE, self.words * WORD).any(1)
        self.union_count = union.sum(1)
        # Beyond the padding the kernels must not look.
        self.union_idx = torch.full(union.shape, -(2**30), dtype=torch.int32, device=device)
        for tile, row in enumerate(union):
            index = row.nonzero().flatten().to(torch.int32)
            self.union_idx[tile, : -(-len(index) // WORD) * WORD] = -1
            self.union_idx[tile, : len(index)] = index
        self.block_ptr = torch.zeros(self.tiles + 1, dtype=torch.int32, device=device)
        self.block_ptr[1:] = ((self.union_count + WORD - 1) // WORD).cumsum(0)
        self.tile_order = torch.sort(-self.union_count, stable=True).indices.to(torch.int32)

    def padded(self, dense: Tensor) -> Tensor:
        full = torch.zeros(self.active.shape, dtype=torch.bfloat16, device=dense.device)
        full[: self.m, : self.h] = dense
        return full

    def pack(self, dense: Tensor) -> Tensor:
        """[M, H] by position -> packed values, NaN beyond them."""
        values = self.padded(dense)[self.active]
        out = torch.full((len(values) // 8 * 8 + 8,), float("nan"), dtype=torch.bfloat16, device=dense.device)
        out[: len(values)] = values
        return out

    def compact(self, dense: Tensor) -> Tensor:
        """[M, H] by position -> blocks [128][64] in their swizzled image."""
        full = self.padded(dense) * self.active
        rows = torch.arange(TILE, device=dense.device)[:, None]
        piece = torch.arange(8, device=dense.device)[None] ^ (rows & 7)
        blocks = []
        for tile, count in enumerate(self.union_count.tolist()):
            number = -(-count // WORD)
            columns = torch.zeros(TILE, number * WORD, dtype=torch.bfloat16, device=dense.device)
            columns[:, :count] = full[tile * TILE : (tile + 1) * TILE, self.union_idx[tile, :count].long()]
            block = columns.view(TILE, number, 8, 8).transpose(0, 1)
            blocks.append(torch.gather(block, 2, piece[None, :, :, None].expand(number, TILE, 8, 8)))
        blocks.append(torch.zeros(1, TILE, 8, 8, dtype=torch.bfloat16, device=dense.device))  # never empty
        return torch.cat(blocks).contiguous()
