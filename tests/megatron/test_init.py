"""First weights depend on the seed and the parameter's name, not on the parallel layout."""

import numpy as np
import pytest
import torch

from megasparse.megatron.init import fill_normal, global_name, shard_rows
from tests.launch import run_distributed
from tests.megatron.helpers import LAYOUTS
from tests.megatron.tiny_model import Arrays, assemble


def weights(layout: str, **config: object) -> Arrays:
    ranks, parallel = LAYOUTS[layout]
    return assemble(run_distributed(ranks, "tests.megatron.cases:first_weights", {**parallel, **config}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_same_at_any_layout(layout: str, tied: bool) -> None:
    expected = weights("one", model__tie_embeddings=tied)
    actual = weights(layout, model__tie_embeddings=tied)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        np.testing.assert_array_equal(actual[name], want, err_msg=name)


def test_seed_and_scale() -> None:
    first, other = weights("one"), weights("one", training__seed=7)
    plain = weights("one", model__scale_output_init=False)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert not np.array_equal(first[name], other[name])
    np.testing.assert_allclose(first[name] * np.sqrt(8), plain[name], rtol=1e-6)
    assert plain[name].std() == pytest.approx(0.2, rel=0.1)
    assert not np.array_equal(plain[name], plain["decoder.layers.2.mlp.linear_fc2.weight"])
    np.testing.assert_array_equal(first["decoder.final_layernorm.weight"], 1.0)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("dim", "stride"), [(0, 1), (0, 2), (1, 1)])
def test_shards_are_parts_of_the_whole(size: int, dim: int, stride: int) -> None:
    rows, columns = 1200, 24  # rows of several blocks of draws, and of blocks cut by shards

    def filled(local: tuple[int, int], rank: int, parts: int) -> torch.Tensor:
        weight = torch.empty(*local)
        weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, stride  # type: ignore
        fill_normal(weight, "w", 3, 1.0, rank, parts)
        return weight

    whole = filled((rows, columns), 0, 1)
    local = (rows // size, columns) if dim == 0 else (rows, columns // size)
    for rank in range(size):
        runs, kept = shard_rows(*local, rank, size, dim, stride)
        expected = torch.cat([whole[start:stop, kept] for start, stop in runs])
        torch.testing.assert_close(filled(local, rank, size), expected, rtol=0, atol=0)


def test_global_names() -> None:
    assert global_name("decoder.layers.1.mlp.linear_fc1.weight", 6, True) == "decoder.layers.7.mlp.linear_fc1.weight"
    assert global_name("output_layer.weight", 6, True) == "embedding.word_embeddings.weight"
    assert global_name("output_layer.weight", 6, False) == "output_layer.weight"
