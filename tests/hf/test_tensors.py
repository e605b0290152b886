"""The mapping of tensors: inverse of itself, and as Megatron lays q, k and v out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.config import ModelConfig
from megasparse.hf.architectures import architecture_of
from megasparse.hf.tensors import Weight, chunks, hf_shapes, join, split, weights


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.integers(1, 4))
    heads = groups * draw(st.integers(1, 3))
    width = draw(st.sampled_from([2, 4, 6]))
    return ModelConfig(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=heads * draw(st.sampled_from([2, 4])),
        ffn_hidden_size=draw(st.integers(1, 12)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        gated=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        vocab_size=draw(st.integers(1, 20)),
    )


@settings(max_examples=60, deadline=None)
@given(models())
def test_join_undoes_split(model: ModelConfig) -> None:
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    for weight in weights(model, architecture_of(model), model.vocab_size + 5):
        tensor = torch.randn(weight.shape, generator=generator)
        if weight.kind == "vocab":
            tensor[model.vocab_size :] = 0
        parts = split(weight, tensor, model, model.vocab_size)
        assert [tuple(part.shape) for part in parts] == hf_shapes(weight, model, model.vocab_size)
        assert torch.equal(join(weight, parts, model), tensor), weight


@settings(max_examples=60, deadline=None)
@given(models(), st.integers(1, 9))
def test_chunks_tile_the_weight(model: ModelConfig, most: int) -> None:
    for weight in weights(model, architecture_of(model), 24):
        covered = torch.zeros(weight.shape, dtype=torch.int64)
        for offsets, sizes in chunks(weight, most):
            covered[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
        assert bool((covered == 1).all()), weight


def test_names_are_unique_and_complete() -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=6, num_attention_heads=2, vocab_size=5, tie_embeddings=False
    )
    listed = weights(model, architecture_of(model), 128)
    names = [name for weight in listed for name in weight.names]
    assert len(names) == len(set(names)) == 2 * 9 + 3
    count = sum(math.prod(shape) for weight in listed for shape in hf_shapes(weight, model, 5))
    assert count == 2 * 5 * 8 + 2 * (4 * 8 * 8 + 3 * 6 * 8 + 2 * 8) + 8


@pytest.mark.parametrize("heads_per_group", [1, 2])
def test_rows_of_qkv_are_grouped(heads_per_group: int) -> None:
    groups, width = 2, 2
    model = ModelConfig(
        num_layers=1, hidden_size=4, ffn_hidden_size=4, num_attention_heads=groups * heads_per_group,
        num_query_groups=groups, kv_channels=width, vocab_size=4,
    )  # fmt: skip
    rows = [(kind, group, head, i) for group in range(groups)
            for kind, count in (("q", heads_per_group), ("k", 1), ("v", 1)) for head in range(count)
            for i in range(width)]  # fmt: skip
    labels = torch.arange(len(rows), dtype=torch.float32)
    weight = Weight("qkv", 0, (len(rows),), ("q", "k", "v"), "qkv", 0, groups)
    for kind, part in zip("qkv", split(weight, labels, model, 4), strict=True):
        expected = sorted(row for row in rows if row[0] == kind)
        assert [rows[int(index)] for index in part] == expected
