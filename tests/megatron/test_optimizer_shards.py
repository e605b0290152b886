"""The distributed optimizer's state, saved and loaded in pieces: bit by bit what Megatron's own checkpoints hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megasparse.megatron.neuron_weight import TransposedWeightFactory
from megasparse.megatron.optimizer_shards import blocks, pieces, rectangles
from tests.launch import run_distributed


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_rectangles_hold_the_range_in_its_order(rows: int, width: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows * width))
    end = data.draw(st.integers(start, rows * width))
    matrix = torch.arange(rows * width).view(rows, width)
    cuts = rectangles(start, end, width)
    found = [matrix[c.row : c.row + c.rows, c.column : c.column + c.columns].flatten() for c in cuts]
    assert torch.equal(torch.cat([torch.arange(0), *found]), torch.arange(start, end))
    assert all(part.numel() for part in found)
    assert len(cuts) <= 3


LAYER, LAYERS = 2, 5


def plain(weight: torch.Tensor) -> ShardedTensor:
    """Of the second of three tensor-parallel ranks, by rows."""
    return ShardedTensor.from_rank_offsets("w", weight, (0, LAYER, LAYERS), (1, 1, 3), prepend_axis_num=1)


def gated(weight: torch.Tensor) -> ShardedTensorFactory:
    return apply_swiglu_sharded_factory(plain(weight), ((0, LAYER, LAYERS),))


def transposed(weight: torch.Tensor) -> ShardedTensorFactory:
    def build(key: str, tensor: torch.Tensor, *_: Any) -> ShardedTensor:
        offsets = (0, LAYER, LAYERS), (2, 1, 3)
        return ShardedTensor.from_rank_offsets(key, tensor.t().contiguous(), *offsets, prepend_axis_num=1)

    return TransposedWeightFactory("w", weight, build, torch.t)


@settings(deadline=None)
@given(st.sampled_from([plain, gated, transposed]), st.integers(1, 4), st.integers(1, 5), st.data())
def test_pieces_of_all_ranks_make_the_tensor_of_the_checkpoint(
    kind: Any, half: int, width: int, data: st.DataObject
) -> None:
    weight = torch.arange(1.0, 2 * half * width + 1).view(2 * half, width)
    sharded = kind(weight)
    parts = [sharded] if kind is plain else sharded.build() if kind is gated else [sharded.build()]
    wanted, found = torch.zeros(parts[0].global_shape), torch.zeros(parts[0].global_shape)
    for part in parts:
        wanted[part.global_slice()] = part.data
    cuts = sorted(data.draw(st.lists(st.integers(0, weight.numel()), max_size=4)))
    for start, end in zip([0, *cuts], [*cuts, weight.numel()], strict=True):
        share = weight.flatten()[start:end]
        for piece in pieces(blocks(weight, sharded), start, end):
            view = piece.view(share)
            assert view.shape == piece.place.local_shape
            assert not found[piece.place.global_slice()].any()
            found[piece.place.global_slice()] = view
    assert torch.equal(found, wanted)


def test_a_vector_is_one_piece() -> None:
    weight = torch.arange(12.0)
    sharded = ShardedTensor.from_rank_offsets("w", weight, (0, LAYER, LAYERS), prepend_axis_num=1)
    [piece] = pieces(blocks(weight, sharded), 3, 8)
    assert (piece.place.global_offset, piece.place.local_shape) == ((LAYER, 3), (1, 5))
    assert torch.equal(piece.view(weight[3:8])[0], torch.arange(3.0, 8.0))


def test_an_unknown_factory_is_refused() -> None:
    weight = torch.zeros(4, 2)
    factory = ShardedTensorFactory("name", weight, lambda key, tensor, *_: plain(tensor.t().contiguous()), torch.t)
    with pytest.raises(ValueError, match=r"name: .* weight \[4, 2\] goes into no checkpoint"):
        blocks(weight, factory)


TENSOR = {"parallel__tensor": 2}


@pytest.mark.parametrize(
    ("config", "saved", "loaded", "model"),
    [
        ({}, (4, {**TENSOR, "parallel__pipeline": 2}), (3, {}), {}),
        ({"model__gated": False}, (3, {}), (2, TENSOR), {}),
        ({}, (3, {}), (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}), {}),
        ({"model__tie_embeddings": False}, (2, {"parallel__context": 2}), (4, TENSOR), {"dense": True}),
    ],
    ids=["tied-tp2-pp2-to-dp3", "non-gated-dp3-to-tp2", "dp3-to-pp2-interleaved", "dense-cp2-to-tp2-dp2"],
)
def test_either_reads_what_the_other_wrote(
    tmp_path: Path, config: dict[str, Any], saved: tuple[int, dict], loaded: tuple[int, dict], model: dict[str, Any]
) -> None:
    """Megatron's own methods and ours, at another layout, where the vocabulary has other padding too."""
    config = {"model__vocab_size": 97, **config}
    cases, rest = "tests.megatron.optimizer_shards_cases", (model, str(tmp_path))
    ranks, parallel = saved
    for own, written, are_views in run_distributed(ranks, f"{cases}:save", {**config, **parallel}, *rest):
        assert own == written > 0
        assert are_views
    ranks, parallel = loaded
    for problems in run_distributed(ranks, f"{cases}:load", {**config, **parallel}, *rest):
        assert not problems
