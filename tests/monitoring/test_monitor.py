"""The monitor on real layers whose figures are worked out by hand, read back from JSONL and from W&B's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megasparse.monitoring.record import read_records
from tests.launch import run_distributed
from tests.monitoring.wandb_file import OfflineRun, offline_runs

BY_HAND = {
    # Layer 0: active neurons 1 + 1 + 2 of three counted tokens; |h| 1 + 1 + (6 + 3); neurons 2, 3 fire for padding
    "sparsity/layer_0/l0": 4 / 3,
    "sparsity/layer_0/l1": 11 / 3,
    "sparsity/layer_0/density": 1 / 3,
    "sparsity/layer_0/dead_fraction": 0.5,
    "sparsity/layer_0/union_fraction": 1.0,  # the tile's padding costs work too
    "sparsity/layer_1/l0": 0.0,
    "sparsity/layer_1/l1": 0.0,
    "sparsity/layer_1/density": 0.0,
    "sparsity/layer_1/dead_fraction": 1.0,
    "sparsity/layer_1/union_fraction": 0.0,
    "loss/l1": (0.3 * 11 / 3 + 0.6 * 0.0) / 2,
    "l1/coeff": 0.45,
    "l1/layer_0/coeff": 0.3,
    "l1/layer_1/coeff": 0.6,
    "grad_norm": 0.5,
    "throughput/tokens_per_second": 3 / 0.25,
    "throughput/tokens_per_second_per_gpu": 3 / 0.25,
    # 2 FLOPs x 2 layers x (4 projections 2x2, scores and values 2 x 2 wide x 2.5 keys, 3 products 2x4), head 2x8; x 3
    "throughput/tflops_per_gpu": 12 * 3 * 2 * (2 * (4 * 4 + 2 * 2 * 2.5 + 3 * 8) + 16) / 1e12,
    "perf/step_time_s": 0.25,
    "perf/data_wait_s": 0.01,
    "perf/own_time_s": 0.2,
    "perf/slowest_rank": 0,
    "perf/slowest_rank_ratio": 1.0,
}


def run(
    directory: Path, first: int, last: int, run_id: Any = None, attempt: int = 1, mode: str = "offline", *more: Any
) -> Any:
    case = "tests.monitoring.cases:hand_run"
    env = {"WANDB_CONFIG_DIR": str(directory / "c"), "WANDB_CACHE_DIR": str(directory / "d")}
    return run_distributed(1, case, directory, first, last, run_id, attempt, mode, *more, env=env)[0]


def check(metrics: Any, step: int) -> None:
    for name, value in BY_HAND.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
    assert metrics["sparsity/layer_0/path"] == metrics["sparsity/layer_1/path"] == "dense"
    assert metrics["loss/lm"] == pytest.approx(6 / step)
    assert metrics["lr"] == pytest.approx(1e-3 * step)
    assert metrics["progress/tokens"] == 3 * step
    assert metrics["memory/peak_rss_bytes"] >= metrics["memory/rss_bytes"] > 1e7
    assert 0 <= metrics["perf/monitor_share"] < 1
    for absent in ("throughput/mfu", "energy/joules_per_token", "memory/peak_allocated_bytes"):
        assert absent not in metrics  # not measurable on a CPU


def test_jsonl_and_wandb_hold_the_hand_computed_metrics(tmp_path: Path) -> None:
    run_id = run(tmp_path, 1, 30)
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [(r.step, r.split) for r in records] == [
        (1, "train"), (10, "train"), (15, "valid"), (20, "train"), (30, "train"), (30, "valid"),
    ]  # fmt: skip
    train = {record.step: record.metrics for record in records if record.split == "train"}
    for step, metrics in train.items():
        check(metrics, step)
    assert train[10]["dead_neurons/layer_0/reinitialised"] == 0
    assert train[10]["dead_neurons/layer_1/reinitialised"] == 4 + 7  # of every step since the record before
    assert "dead_neurons/layer_0/reinitialised" not in train[20]
    # Dense path, fp32: four tokens of two numbers (input) and at most ten of four (products, activations, their signs).
    for layer in (0, 1):
        name = f"memory/layer_{layer}/saved_bytes"
        assert [step for step in train if name in train[step]] == [1, 20]  # memory_interval
        saved, peak = int(train[1][name] or 0), int(train[1][f"memory/layer_{layer}/peak_bytes"] or 0)
        assert 4 * 4 * (2 + 4) <= saved <= 4 * 4 * (2 + 10 * 4)
        assert peak == saved + 4 * 4 * 2
    assert records[2].metrics == {"eval/loss": 3.0, "eval/ppl": 20.0, "eval/layer_0/l0": 1.5}

    (directory,) = offline_runs(tmp_path)
    offline = OfflineRun(directory)
    assert offline.id == run_id
    assert [row["_step"] for row in offline.history] == [1, 10, 15, 20, 30]
    for row in offline.history:
        if row["_step"] != 15:
            check(row, row["_step"])
    assert offline.history[2]["eval/loss"] == offline.history[4]["eval/loss"] == 3.0
    assert offline.config["model"]["ffn_hidden_size"] == 4
    assert offline.config["environment"]["versions"]["megatron-core"]


def test_skipped_steps_and_pauses_are_not_counted(tmp_path: Path) -> None:
    """A skipped step says nothing of which neurons are dead; a validation's energy is no step's."""
    run(tmp_path, 1, 30, None, 1, "disabled", 5, (6.0, 1000.0))
    records = read_records(tmp_path / "metrics.jsonl")
    train = {record.step: record.metrics for record in records if record.split == "train"}
    assert sorted(train) == [1, 10, 20, 30]  # with a validation after step 15
    for metrics in train.values():
        assert metrics["sparsity/layer_0/dead_fraction"] == 0.5
        assert metrics["sparsity/layer_1/dead_fraction"] == 1.0
        assert metrics["energy/joules_per_token"] == 2.0


def test_run_json_and_the_report_are_written(tmp_path: Path) -> None:
    run(tmp_path, 1, 10, mode="disabled")
    run(tmp_path, 11, 30, mode="disabled")
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["config"]["run"]["name"] == "hand"
    assert content["environment"]["parameters"] == 123
    assert [start["step"] for start in content["starts"]] == [0, 10]
    assert "<h1>hand</h1>" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "wandb").exists()


def test_resume_and_rollback_keep_one_run_in_both_sinks(tmp_path: Path) -> None:
    run_id = run(tmp_path, 1, 30)
    assert run(tmp_path, 16, 30, run_id, attempt=2) == run_id  # from the checkpoint of step 15
    train = [record for record in read_records(tmp_path / "metrics.jsonl") if record.split == "train"]
    assert [(record.step, record.metrics["optim/attempt"]) for record in train] == [(1, 1), (10, 1), (20, 2), (30, 2)]
    (directory,) = offline_runs(tmp_path)
    history = OfflineRun(directory).history
    steps = [(row["_step"], row.get("optim/attempt")) for row in history]
    assert steps == [(1, 1), (10, 1), (15, None), (20, 2), (30, 2)]


def test_observing_costs_less_than_one_percent(tmp_path: Path) -> None:
    """At the default interval, JSONL and W&B on. The first records hold one-off costs of the W&B client; of the others
    the least counts: what other processes take of a busy machine comes on top, what the monitor costs is in each."""
    (shares,) = run_distributed(1, "tests.monitoring.cases:cost_run", tmp_path, 80)
    assert len(shares) == 9
    assert min(shares[2:]) < 0.01
