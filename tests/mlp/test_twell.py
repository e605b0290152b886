"""The packed format against its definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.mlp.twell import bits_to_words, pack, pattern_of, tile_lists, unpack, words_to_bits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(1, 200), st.floats(0, 1), st.integers(0, 5))
def test_round_trip_and_addresses(tokens: int, hidden: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, hidden, generator=generator)
    dense[torch.rand(tokens, hidden, generator=generator) >= density] = 0
    pattern = pattern_of(dense)
    values = pack(dense, pattern)
    assert values.numel() == (dense != 0).sum() == pattern.row_ptr[-1]
    assert torch.equal(unpack(values, pattern, tokens, hidden), dense)
    for token, neuron in dense.nonzero()[:: max(1, values.numel() // 50)].tolist():
        word, bit = divmod(neuron, 64)
        before = (int(pattern.mask[token, word]) & ((1 << bit) - 1)).bit_count()
        offset = int(pattern.offset[token, word]) & 0xFFFF
        assert values[int(pattern.row_ptr[token]) + offset + before] == dense[token, neuron]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400), st.integers(1, 200), st.floats(0, 0.2))
def test_tile_lists(tokens: int, hidden: int, density: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dense = (torch.rand(tokens, hidden, generator=generator) < density).float()
    lists = tile_lists(pattern_of(dense))
    sizes = []
    for tile, rows in enumerate(dense.split(128) if tokens else []):
        union = rows.any(0).nonzero().squeeze(1)
        sizes.append(len(union))
        assert lists.union_index[tile, : len(union)].tolist() == union.tolist()
        assert (lists.union_index[tile, len(union) :] == -1).all()
        assert words_to_bits(lists.union_words[tile]).nonzero().squeeze(1).tolist() == union.tolist()
    count, block_ptr, order = lists.tile_info.tolist()
    assert count == [*sizes, 0]
    assert block_ptr == [sum(-(-size // 64) for size in sizes[:tile]) for tile in range(len(sizes) + 1)]
    assert order[:-1] == sorted(range(len(sizes)), key=lambda tile: (-sizes[tile], tile))


def test_nan_counts_as_non_zero_and_bit_63_survives() -> None:
    dense = torch.zeros(1, 64)
    dense[0, 63] = torch.nan
    pattern = pattern_of(dense)
    assert pattern.mask[0, 0] == -(2**63)
    assert pack(dense, pattern).isnan().all()


def test_words_hold_bits_in_order() -> None:
    bits = torch.zeros(128, dtype=torch.bool)
    bits[[0, 5, 64, 127]] = True
    words = bits_to_words(bits)
    assert words.tolist() == [0b100001, 1 - 2**63]
    assert torch.equal(words_to_bits(words), bits)


def test_offsets_beyond_int16_read_as_unsigned() -> None:
    dense = torch.ones(1, 40000)
    offset = pattern_of(dense).offset[0, -1]
    assert int(offset) & 0xFFFF == 39936
