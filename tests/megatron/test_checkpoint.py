"""A checkpoint of the sparse MLP and one of Megatron's dense MLP are the same checkpoint, optimizer states included."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_distributed
from tests.megatron.helpers import LAYOUTS, assert_close
from tests.megatron.tiny_model import Arrays, assemble


def train(layout: str, dense: bool, sharded: bool, steps: list[int], **files: str) -> tuple[list[float], Arrays]:
    ranks, parallel = LAYOUTS[layout]
    config: dict[str, Any] = {**parallel, "parallel__distributed_optimizer": sharded}
    target = "tests.megatron.cases:train"
    results = run_distributed(ranks, target, config, {"dense": dense}, steps, files.get("load"), files.get("save"))
    losses, norms, _ = results[-1]
    return losses + norms, assemble([shards for *_, shards in results])


@pytest.mark.parametrize("sharded", [False, True], ids=["plain optimizer", "distributed optimizer"])
@pytest.mark.parametrize(
    ("saved", "saved_dense", "loaded", "loaded_dense"),
    [
        ("tp2", False, "one", True),
        ("one", True, "tp2-sp", False),
        ("tp2-sp-pp2", True, "dp2", False),
        ("dp2", False, "tp2-sp-pp2", True),
        ("pp2", False, "tp2", False),
        ("pp2-interleaved", False, "pp2", True),
    ],
)
def test_interchange(
    tmp_path: Path, saved: str, saved_dense: bool, loaded: str, loaded_dense: bool, sharded: bool
) -> None:
    """Two steps, save, load elsewhere, a third step: as three steps in one go."""
    expected, weights = train("one", False, sharded, [0, 1, 2])
    directory = str(tmp_path / "checkpoint")
    train(saved, saved_dense, sharded, [0, 1], save=directory)
    numbers, resumed = train(loaded, loaded_dense, sharded, [2], load=directory)
    assert numbers == pytest.approx([expected[2], expected[5]], rel=2e-5)
    assert_close(resumed, weights, 1e-4)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "non-gated"])
@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "dp2"])
def test_same_keys_shapes_and_contents_as_the_dense_mlp(layout: str, gated: bool) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = {**parallel, "model__gated": gated}
    target = "tests.megatron.cases:sharded_keys"
    sparse = run_distributed(ranks, target, config, False)
    dense = run_distributed(ranks, target, config, True)
    for ours, theirs in zip(sparse, dense, strict=True):
        assert [item[:-1] for item in ours] == [item[:-1] for item in theirs]
        assert [item[-1] for item in ours] == pytest.approx([item[-1] for item in theirs], abs=1e-5)


@pytest.mark.parametrize("width", [48, 32], ids=["", "square weight"])
def test_plain_state_dicts_are_interchangeable_too(width: int) -> None:
    ((dense_to_sparse, sparse_to_dense),) = run_distributed(
        1, "tests.megatron.cases:plain_state", {"model__ffn_hidden_size": width}
    )
    assert dense_to_sparse
    assert sparse_to_dense
