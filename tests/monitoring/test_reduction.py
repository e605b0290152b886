"""Metrics of real parallel runs against a count over every token and neuron, gathered from all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasparse.monitoring.record import read_records
from megasparse.monitoring.sinks.jsonl import FILE_NAME
from tests.launch import run_distributed
from tests.monitoring.cases import Seen

LAYERS, WIDTH, STEPS, WINDOW = 4, 48, 3, 2
COEFFICIENTS = [1e-3, 2e-3, 0.0, 4e-3]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "tp2_sp": (2, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
    "dp2": (2, {}),
    "cp2": (2, {"parallel__context": 2}),
    "tp2_dp2": (4, {"parallel__tensor": 2}),
    "pp2_recompute": (2, {"parallel__pipeline": 2, "training__recompute": "full"}),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reductions_equal_a_brute_force_gather(layout: str, masked: bool, tmp_path: Path) -> None:
    world, parallel = LAYOUTS[layout]
    config = parallel | {"sparsity__dead_window_steps": WINDOW}
    kill = 5
    ranks = run_distributed(
        world, "tests.monitoring.cases:observed_run", config, tmp_path, STEPS, kill, masked, COEFFICIENTS
    )
    records = list(read_records(tmp_path / FILE_NAME))
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    for step, record in enumerate(records):
        terms = 0.0
        for layer in range(LAYERS):
            calls = [calls_of(ranks, s, layer) for s in range(step + 1)]
            l0, l1, union = expected(calls[step])
            window = calls[max(0, step + 1 - WINDOW) :]
            dead = WIDTH - int(fired(window).sum())
            assert dead >= kill * (2 if "parallel__tensor" in parallel else 1)
            metrics = {name: record.metrics[f"sparsity/layer_{layer}/{name}"] for name in NAMES}
            assert metrics["l0"] == pytest.approx(l0, rel=1e-12)
            assert metrics["density"] == pytest.approx(l0 / WIDTH, rel=1e-12)
            assert metrics["l1"] == pytest.approx(l1, rel=1e-5)
            assert metrics["dead_fraction"] == pytest.approx(dead / WIDTH, rel=1e-12)
            assert metrics["union_fraction"] == pytest.approx(union, rel=1e-12)
            assert metrics["path"] == "dense"
            terms += COEFFICIENTS[layer] * l1
        assert record.metrics["loss/l1"] == pytest.approx(terms / LAYERS, rel=1e-5)
        assert record.metrics["perf/data_wait_s"] == pytest.approx(0.001 * world)
        # Rank n takes n + 1 ms. With two stages, of 1, 2 and 3, 4 ms, the second is slowest against its own stage.
        staged = parallel.get("parallel__pipeline", 1) > 1
        slowest = world // 2 - 1 if staged else world - 1
        assert record.metrics["perf/slowest_rank"] == slowest
        assert record.metrics["perf/own_time_s"] == pytest.approx(0.001 * (slowest + 1))
        assert record.metrics["throughput/tokens_per_second"] == pytest.approx(4 * 16 / 0.5)
        assert record.metrics["throughput/tokens_per_second_per_gpu"] == pytest.approx(4 * 16 / 0.5 / world)
        assert int(record.metrics["memory/rss_bytes"] or 0) > 10**7
    for layer in range(LAYERS):
        assert int(records[0].metrics[f"memory/layer_{layer}/saved_bytes"] or 0) > 0
        assert f"memory/layer_{layer}/saved_bytes" not in records[1].metrics  # sampled every 100 steps


NAMES = ("l0", "l1", "density", "dead_fraction", "union_fraction", "path")


def calls_of(ranks: list[list[list[Seen]]], step: int, layer: int) -> list[Seen]:
    """Every call of one layer in one step, over all ranks."""
    return [seen for rank in ranks for seen in rank[step] if seen.layer == layer]


def expected(calls: list[Seen]) -> tuple[float, float, float]:
    """(L0, L1, union fraction) over whole neurons and all tokens."""
    tokens = sum(int(call.counted.sum()) for call in calls if call.tensor_rank == 0)
    active = sum(int(call.active[call.counted].sum()) for call in calls)
    magnitude = sum(float(call.magnitude[call.counted].sum()) for call in calls)
    tiles = sum(len(tiles_of(call.active)) for call in calls if call.tensor_rank == 0)
    union = sum(int(tile.any(axis=0).sum()) for call in calls for tile in tiles_of(call.active))
    return active / tokens, magnitude / tokens, union / (tiles * WIDTH)


def tiles_of(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[first : first + 128] for first in range(0, len(rows), 128)]


def fired(steps: list[list[Seen]]) -> np.ndarray:
    """bool [WIDTH]: fired for a counted token anywhere in these steps."""
    parts: dict[int, np.ndarray] = {}
    for calls in steps:
        for call in calls:
            one = call.active[call.counted].any(axis=0)
            parts[call.tensor_rank] = parts.get(call.tensor_rank, np.zeros_like(one)) | one
    return np.concatenate([parts[rank] for rank in sorted(parts)])
