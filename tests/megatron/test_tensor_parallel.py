"""What tensor parallelism communicates in the sparse MLP's backward, and when; what it keeps until then."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.launch import run_distributed
from tests.megatron.helpers import LAYOUTS, assert_close, run_gradients
from tests.megatron.tensor_parallel_cases import BATCH, SEQUENCE
from tests.megatron.test_l1 import RECOMPUTE

ENOUGH = SEQUENCE * BATCH * 48
"""Saved non-zeros that hold every pattern of these MLPs."""
INPUT_BYTES = SEQUENCE * BATCH * 32 * 4


@cache
def watched(layout: str, path: str, gated: bool = True, capacity: int = ENOUGH) -> list[dict[str, Any]]:
    ranks, parallel = LAYOUTS[layout]
    config = {**parallel, "sparsity__path": path, "model__gated": gated}
    return run_distributed(ranks, "tests.megatron.tensor_parallel_cases:watch", config, capacity)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_sum_over_ranks_runs_beside_the_weight_gradients(path: str) -> None:
    for rank in watched("tp2", path):
        assert rank["events"] == ["input_gradient", "all_reduce started", "weight_gradients", "all_reduce done"]


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_sequence_parallelism_gathers_beside_the_input_gradient(path: str) -> None:
    """Nothing reads the gathered input before it is there."""
    for rank in watched("tp2-sp", path):
        assert rank["events"] == [
            "all_gather_into_tensor started",
            "input_gradient",
            "all_gather_into_tensor done",
            "complete_input_gradient",
            "reduce_scatter_tensor started",
            "weight_gradients",
            "reduce_scatter_tensor done",
        ]


def test_one_rank_communicates_nothing() -> None:
    (rank,) = watched("one", "sparse")
    assert rank["events"] == ["input_gradient", "weight_gradients"]


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_sequence_parallelism_keeps_its_own_part_of_the_input(path: str) -> None:
    for whole, part in zip(watched("tp2", path), watched("tp2-sp", path), strict=True):
        assert whole["saved"] - part["saved"] == INPUT_BYTES // 2
    if path == "dense":  # besides the input: gate and up of this rank's neurons, and single numbers
        assert 0 <= part["saved"] - INPUT_BYTES // 2 - SEQUENCE * BATCH * 48 * 4 < 64


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("layout", ["tp2", "tp2-sp"])
@pytest.mark.parametrize("capacity", [0, 1000])
def test_exact_where_the_forward_saved_too_little(layout: str, gated: bool, capacity: int) -> None:
    everything, little = watched(layout, "sparse", gated), watched(layout, "sparse", gated, capacity)
    for expected, actual in zip(everything, little, strict=True):
        assert actual["saved"] < expected["saved"]
        for name, value in expected["values"].items():
            np.testing.assert_array_equal(actual["values"][name], value, err_msg=name)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("layout", ["tp2", "tp2-sp"])
def test_one_rank_gets_the_same(layout: str, path: str) -> None:
    (one,) = watched("one", path)
    ranks = watched(layout, path)
    for name in ("output", "input"):
        parts = [rank["values"][name] for rank in ranks]
        for part in parts if layout == "tp2" else [np.concatenate(parts)]:
            np.testing.assert_allclose(part, one["values"][name], rtol=1e-4, atol=1e-5 * np.abs(part).max())


@pytest.mark.parametrize("recompute", ["full", "mlp"])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_recomputation_changes_nothing(path: str, recompute: str) -> None:
    model, step = {"coeff": 1e-2}, {"masked": True}
    loss, gradients = run_gradients("tp2-sp", model, step, sparsity__path=path, **RECOMPUTE[recompute])
    expected_loss, expected = run_gradients("tp2-sp", model, step, sparsity__path=path)
    assert loss == expected_loss
    assert_close(gradients, expected, 1e-6)
