"""Learning rate and L1 coefficient over the steps, against closed forms; the target controller on a model of L0."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.config import Config, parse_config
from megasparse.training import l1 as law
from megasparse.training.l1 import L1Controller
from megasparse.training.schedule import LearningRate
from tests.training.cases import configuration

LR, MIN = 1e-3, 1e-4


def config(**sections: Any) -> Config:
    return parse_config(configuration(Path("run"), "data", **sections))


def rates(steps: int, **schedule: Any) -> list[float]:
    cfg = config(training={"steps": steps}, optimizer={"lr": LR, "min_lr": MIN, "schedule": schedule})
    weight = torch.nn.Parameter(torch.zeros(1))
    of_old_run = {"max_lr": 7.0, "min_lr": 5.0}  # as a checkpoint brings them back
    groups = [
        {"params": [weight], "wd_mult": 1.0},
        {"params": [torch.nn.Parameter(torch.zeros(1))], "wd_mult": 0.0, **of_old_run},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    schedule_of_run = LearningRate(cfg, optimizer)
    result = []
    for step in range(1, steps + 1):
        result.append(schedule_of_run.set_step(step))
        assert [group["lr"] for group in optimizer.param_groups] == [result[-1]] * 2
        assert [group["weight_decay"] for group in optimizer.param_groups] == [cfg.optimizer.weight_decay, 0.0]
    assert schedule_of_run.rate(3) == result[2]  # of the step alone: nothing to save or restore
    return result


def test_cosine_with_warm_up() -> None:
    expected = [LR * s / 10 for s in range(1, 11)]
    expected += [MIN + (LR - MIN) * 0.5 * (1 + math.cos(math.pi * (s - 10) / 40)) for s in range(11, 51)]
    expected += [MIN] * 10
    assert rates(60, kind="cosine", warmup_steps=10, decay_steps=50) == pytest.approx(expected)


def test_linear_without_warm_up() -> None:
    assert rates(20, kind="linear") == pytest.approx([LR - (LR - MIN) * s / 20 for s in range(1, 21)])


@pytest.mark.parametrize(
    ("shape", "curve"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: 0.5 * (1 + math.cos(math.pi * x))),
        ("exponential", lambda x: 2 * 0.5**x - 1),
        ("minus_sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
def test_warm_up_stable_decay(shape: str, curve: Any) -> None:
    expected = [LR * s / 5 for s in range(1, 6)] + [LR] * 25
    expected += [MIN + (LR - MIN) * curve(s / 10) for s in range(1, 11)]
    assert rates(40, kind="wsd", warmup_steps=5, decay_steps=10, wsd_decay=shape) == pytest.approx(expected)


def test_constant_with_warm_up_as_long_as_the_run() -> None:
    assert rates(8, kind="constant", warmup_steps=8) == pytest.approx([LR * s / 8 for s in range(1, 9)])


def coefficients(controller: L1Controller, steps: int) -> list[float]:
    mlps = [SimpleNamespace(layer_index=i, l1_coeff=torch.zeros((), dtype=torch.float32)) for i in range(4)]
    result = []
    for step in range(1, steps + 1):
        controller.set_step(step, mlps)
        assert len(set(controller.coefficients)) == 1
        assert [float(mlp.l1_coeff) for mlp in mlps] == pytest.approx(controller.coefficients, rel=1e-6)
        result.append(controller.coefficients[0])
    return result


def test_l1_off_and_constant() -> None:
    assert coefficients(L1Controller(config()), 5) == [0.0] * 5
    l1 = {"mode": "constant", "coeff": 2e-5}
    assert coefficients(L1Controller(config(sparsity={"l1": l1})), 5) == [2e-5] * 5


def test_l1_constant_with_start_warm_up_and_decay() -> None:
    l1 = {
        "mode": "constant", "coeff": 4e-5, "start_step": 4, "warmup_steps": 4, "decay_start_step": 12, "decay_steps": 4,
        "decay_to": 1e-5,
    }  # fmt: skip
    controller = L1Controller(config(sparsity={"l1": l1}, training={"steps": 30}))
    expected = [0.0] * 4 + [1e-5, 2e-5, 3e-5, 4e-5] + [4e-5] * 4 + [3.25e-5, 2.5e-5, 1.75e-5, 1e-5] + [1e-5] * 4
    assert coefficients(controller, 20) == pytest.approx(expected)


def steer(
    response: float, sensitivity: float, steps: int = 800, rest: Callable[[int], float] = lambda _: 400.0
) -> tuple[list[float], L1Controller]:
    """A layer whose log L0 follows its coefficient with time constant `response` and slope `sensitivity`, up to `rest`,
    its L0 of the step without the term."""
    l1 = {"mode": "target", "target_l0": 64, "start_step": 40}
    data = configuration(Path("run"), "data", sparsity={"l1": l1}, training={"steps": steps})
    data["model"]["ffn_hidden_size"] = 5632
    controller = L1Controller(parse_config(data))
    noise, level, track = random.Random(0), math.log(2816.0), []
    for step in range(1, steps + 1):
        controller.set_step(step, [])
        coefficient = controller.coefficients[0]
        goal = math.log(rest(step))
        if coefficient:
            goal = min(goal, math.log(150.0) - sensitivity * math.log(coefficient / 2e-5))
        level += (goal - level) / response
        controller.update(step, [math.exp(level + noise.gauss(0.0, 0.03))] * 4)
        track.append(math.exp(level))
    return track, controller


@pytest.mark.parametrize("response", [20, 60, 120])
@pytest.mark.parametrize("sensitivity", [0.3, 0.6, 1.0])
def test_l1_target_is_met_without_overshoot(response: float, sensitivity: float) -> None:
    """Integral control alone falls to 18 .. 52 here before it settles."""
    track, _ = steer(response, sensitivity)
    assert min(track) > 0.85 * 64
    assert track[-1] == pytest.approx(64, rel=0.15)


def test_l1_target_rests_below_it_and_is_soon_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 steps below the target must not wind the coefficient down so far that the layer then gets away."""

    def rest(step: int) -> float:
        return 40.0 if step < 480 else 400.0

    track, controller = steer(60, 0.6, steps=470, rest=rest)
    assert controller.coefficients[0] == pytest.approx(2e-5 / law.REST)
    assert track[-1] == pytest.approx(40, rel=0.05)
    track, _ = steer(60, 0.6, steps=1000, rest=rest)
    above = sum(level > 1.2 * 64 for level in track[480:])
    monkeypatch.setattr(law, "REST", 1e9)
    wound_down, _ = steer(60, 0.6, steps=1000, rest=rest)
    assert above < 330
    assert sum(level > 1.2 * 64 for level in wound_down[480:]) > 1.4 * above
    assert track[-1] == pytest.approx(64, rel=0.05)


def test_l1_target_keeps_its_bounds_and_its_state() -> None:
    l1 = {"mode": "target", "target_l0": [4, 8, 16, 32], "gain": 0.5}
    cfg = config(sparsity={"l1": l1})
    one, other = L1Controller(cfg), L1Controller(cfg)
    for step in range(1, 60):
        one.update(step, [20.0, 8.0, 8.0, 8.0])
    one.set_step(60, [])
    assert one.coefficients == pytest.approx([2e-3, 2e-5, 1e-6, 1e-6])
    other.load_state_dict(one.state_dict())
    for controller in (one, other):
        controller.update(60, [3.0, 9.0, 7.5, 0.0])
        controller.set_step(61, [])
    assert one.coefficients == other.coefficients
    with pytest.raises(ValueError, match="steers 3 layers, the model has 4"):
        one.load_state_dict({"log_coeff": [0.0] * 3, "ema": [], "error": []})
