"""The same training under every parallel layout: losses, gradient norms and L1 coefficients of 20 steps, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_distributed
from tests.training.cases import DEAD_NEURONS, configuration

STEPS = 20
TOLERANCE = 1e-5
"""Relative; of fp32 sums in another order."""

OVERLAPPED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "tp2-sp-overlapped": (2, {"tensor": 2, "sequence_parallel": True, **OVERLAPPED}),
    "pp2": (2, {"pipeline": 2}),
    "pp2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {}),
    "dp2-distributed-optimizer": (2, {"distributed_optimizer": True}),
    "dp2-overlapped": (2, OVERLAPPED),
    "cp2": (2, {"context": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2-sp-dp2-distributed-optimizer": (4, {"tensor": 2, "sequence_parallel": True, "distributed_optimizer": True}),
}

SPARSITY: dict[str, dict[str, Any]] = {
    "constant": {"l1": {"mode": "constant", "coeff": 5e-2, "warmup_steps": 5}},
    "target-reinit": {
        "l1": {"mode": "target", "target_l0": 8, "coeff": 1e-3, "gain": 0.3, "start_step": 2},
        "reinit": {"every": 4},
        "dead_window_steps": 3,
    },
}


def run(folder: Path, data_folder: Path, world: int, names: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every layout of `names` with every L1 mode; rank 0's records.

    A call each, as process groups end with the call: those of earlier layouts would poll while later ones train.
    """
    found = {}
    for name in names:
        for mode in SPARSITY:
            config = configuration(
                folder / f"{name}-{mode}",
                str(data_folder / "a"),
                parallel=LAYOUTS[name][1] if name in LAYOUTS else {},
                sparsity=SPARSITY[mode],
                data={"eod_mask_loss": True, "tokenizer": str(data_folder / "tokenizer.json")},
                training={"eval_steps": 1, "eval_interval": 10},
            )
            [first], *others = run_distributed(world, "tests.training.cases:train_all", [config], timeout=400)
            for [own] in others:  # what is reported is the same on every rank
                assert losses(own) == losses(first)
                assert own["evaluations"] == first["evaluations"]
            found[name, mode] = first
    return found


def losses(record: dict[str, Any]) -> list[float]:
    return [record["steps"][step]["loss/lm"] for step in sorted(record["steps"])]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    result = run(folder, data_folder, 1, ["one"])
    for world in (2, 4):
        result |= run(folder, data_folder, world, [name for name, (size, _) in LAYOUTS.items() if size == world])
    return result


@pytest.mark.parametrize("mode", SPARSITY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_process(records: dict, layout: str, mode: str) -> None:
    expected, actual = records["one", mode], records[layout, mode]
    assert sorted(actual["steps"]) == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        for name in expected["steps"][step]:
            if name.startswith("perf/"):
                continue
            assert actual["steps"][step][name] == pytest.approx(expected["steps"][step][name], rel=TOLERANCE), (
                f"{name} in step {step}"
            )
    for step, metrics in expected["evaluations"].items():
        assert actual["evaluations"][step] == pytest.approx(metrics, rel=TOLERANCE), f"validation after step {step}"


@pytest.mark.parametrize("mode", SPARSITY)
def test_reference_learns_and_is_regularised(records: dict, mode: str) -> None:
    """Otherwise equality would prove nothing."""
    steps = records["one", mode]["steps"]
    assert steps[STEPS]["loss/lm"] < steps[1]["loss/lm"] - 0.05
    assert steps[STEPS]["l1/coeff"] > 1e-3
    if mode == "target-reinit":
        assert len({steps[STEPS][f"l1/layer_{layer}/coeff"] for layer in range(4)}) > 1
        assert steps[4]["dead_neurons/layer_0/reinitialised"] >= len(DEAD_NEURONS)
        assert steps[8]["dead_neurons/layer_0/reinitialised"] == 0  # they fire again
