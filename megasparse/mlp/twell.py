"""The packed activation format, in PyTorch: TwELL (tile-wise ELLPACK, arXiv 2603.23198) with exact row
capacity.

Neurons are taken in an `order` (a permutation of the H neurons); index p in that order is called a
*position*. Positions are cut into tiles of 64 and tokens into tiles of 128:

    M tokens, Mt = ceil(M / 128) token tiles, Mp = 128 Mt padded tokens, W = ceil(H / 64), Hp = 64 W.

A matrix [M, H] of which few entries are non-zero is stored as

    mask     int64 [Mp, W]   bit j of mask[t, w] is set iff entry (t, 64 w + j) is non-zero (NaN is)
    offset   int16 [Mp, W]   number of non-zeros of row t before tile w (read as unsigned)
    row_ptr  int64 [Mp + 1]  number of non-zeros before row t
    values         [nnz]     the non-zeros, row after row, positions ascending

so entry (t, 64 w + j) is values[row_ptr[t] + offset[t, w] + popcount(mask[t, w] & ((1 << j) - 1))]. Several
matrices that are zero in the same places (gate, up product, their gradients) share all but `values`.

`TileLists` says what each token tile has to gather: the positions active for any of its tokens (their
*union*).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megasparse.mlp.types import TOKEN_TILE

POSITION_TILE = 64


class Pattern(NamedTuple):
    """Where the non-zeros are (see the module's text)."""

    mask: Tensor
    offset: Tensor
    row_ptr: Tensor


class TileLists(NamedTuple):
    """What each token tile gathers; everything follows from `Pattern.mask`."""

    union_words: Tensor
    """int64 [Mt, W]: OR of the mask words of the tile's 128 rows."""
    union_index: Tensor
    """int32 [Mt, Hp]: the union's positions, ascending; -1 after them."""
    tile_info: Tensor
    """int32 [3, Mt + 1]: union size U; exclusive sums of ceil(U / 64); tiles by descending U (ties by index).
    The first and last rows end in an unused 0."""


class Sizes(NamedTuple):
    """Derived sizes of M tokens and H neurons."""

    token_tiles: int
    padded_tokens: int
    position_tiles: int
    padded_hidden: int

    @staticmethod
    def of(tokens: int, hidden: int) -> "Sizes":
        tiles, words = -(-tokens // TOKEN_TILE), -(-hidden // POSITION_TILE)
        return Sizes(tiles, tiles * TOKEN_TILE, words, words * POSITION_TILE)


def bits_to_words(bits: Tensor) -> Tensor:
    """bool [..., 64 n] -> int64 [..., n]; entry j of a group becomes bit j."""
    grouped = bits.unflatten(-1, (bits.shape[-1] // 64, 64))
    return (grouped.long() << torch.arange(64, device=bits.device)).sum(-1)


def words_to_bits(words: Tensor) -> Tensor:
    """int64 [..., n] -> bool [..., 64 n]; the inverse of `bits_to_words`."""
    return ((words.unsqueeze(-1) >> torch.arange(64, device=words.device)) & 1).bool().flatten(-2)


def pattern_of(dense: Tensor) -> Pattern:
    """The pattern of the non-zeros of [M, H]."""
    sizes = Sizes.of(*dense.shape)
    bits = torch.nn.functional.pad(
        dense != 0, (0, sizes.padded_hidden - dense.shape[1], 0, sizes.padded_tokens - dense.shape[0])
    )
    in_tile = bits.view(sizes.padded_tokens, sizes.position_tiles, POSITION_TILE).sum(-1)
    ends = in_tile.cumsum(-1)
    row_ptr = torch.nn.functional.pad(in_tile.sum(-1).cumsum(0), (1, 0))
    # Offsets reach H - 64 at most; as int16 they wrap above 32767, and readers take them as unsigned.
    return Pattern(bits_to_words(bits), (ends - in_tile).to(torch.int16), row_ptr)


def pack(dense: Tensor, pattern: Pattern) -> Tensor:
    """Values of [M, H] at the pattern's non-zeros, in packed order."""
    return dense[_bits(pattern, dense.shape[0], dense.shape[1])]


def unpack(values: Tensor, pattern: Pattern, tokens: int, hidden: int) -> Tensor:
    """[M, H] with `values` (at least nnz of them) at the pattern's non-zeros and 0 elsewhere."""
    dense = values.new_zeros(tokens, hidden)
    dense[_bits(pattern, tokens, hidden)] = values[: int(pattern.row_ptr[-1])]
    return dense


def _bits(pattern: Pattern, tokens: int, hidden: int) -> Tensor:
    return words_to_bits(pattern.mask)[:tokens, :hidden]


def tile_lists(pattern: Pattern) -> TileLists:
    """Unions of every token tile."""
    padded_tokens, words = pattern.mask.shape
    tiles = padded_tokens // TOKEN_TILE
    bits = words_to_bits(pattern.mask).view(tiles, TOKEN_TILE, words * POSITION_TILE)
    union = bits.any(1)
    count = union.sum(1)
    positions = torch.arange(union.shape[1], device=union.device).expand_as(union)
    ranked = torch.where(union, positions, union.shape[1]).sort(1).values
    index = torch.where(ranked == union.shape[1], -1, ranked)
    info = torch.zeros(3, tiles + 1, dtype=torch.int32, device=union.device)
    info[0, :tiles] = count
    info[1, 1:] = ((count + 63) // 64).cumsum(0)
    info[2, :tiles] = count.sort(descending=True, stable=True).indices
    return TileLists(bits_to_words(union), index.to(torch.int32), info)
