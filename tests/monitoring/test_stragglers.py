"""Slow ranks are named, in a real run too."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megasparse.monitoring.stragglers import STEPS, Stragglers
from tests.launch import run_distributed
from tests.training.cases import configuration, write_data

HOSTS = ["n0", "n0", "n1", "n1"]


def test_slow_rank_is_named_once_and_its_recovery_told() -> None:
    ranks = Stragglers(HOSTS, [0] * 4)
    half = STEPS // 2
    slow = [1.0, 1.0, 1.5, 1.0]
    assert ranks.add([half * seconds for seconds in slow], half) is None
    text = ranks.add([half * seconds for seconds in slow], half)
    assert text is not None
    assert text.startswith("SLOW: rank 2 on n1: up to 1.500 s of own work a step, the median is 1.000 s")
    assert ranks.add([STEPS * seconds for seconds in slow], STEPS) is None
    assert ranks.add([STEPS * 1.0] * 4, STEPS) == "SLOW: no rank any more"
    assert ranks.slowest(slow) == (2, 1.5)


def test_stages_have_their_own_pace() -> None:
    ranks = Stragglers(HOSTS, [0, 1, 0, 1])
    assert ranks.add([STEPS * 1.0, STEPS * 3.0, STEPS * 1.1, STEPS * 3.0], STEPS) is None
    text = ranks.add([STEPS * 1.0, STEPS * 3.0, STEPS * 1.1, STEPS * 4.0], STEPS)
    assert text is not None
    assert text.startswith("SLOW: rank 3 on n1: up to 4.000 s of own work a step, the median is 3.000 s")


def test_judging_thousands_of_ranks_takes_no_time_of_a_step() -> None:
    world = 4096
    ranks = Stragglers(["n"] * world, [rank * 8 // world for rank in range(world)])
    own = [1.0 + rank % 7 / 100 for rank in range(world)]
    own[1234] = 2.0
    started = time.process_time()
    assert ranks.slowest(own)[0] == 1234
    assert (ranks.add([STEPS * seconds for seconds in own], STEPS) or "").startswith("SLOW: rank 1234 ")
    assert time.process_time() - started < 0.1


def run_with_a_slow_rank(content: dict[str, Any], slow: int) -> list[str]:
    """Trains on the ranks that call; every forward pass of rank `slow` sleeps. What this rank warned of."""
    import logging

    import torch.distributed as dist

    from megasparse.config import parse_config
    from megasparse.monitoring.monitor import Monitor
    from megasparse.training.callbacks import Callback, TrainState
    from megasparse.training.loop import pretrain

    class Slow(Callback):
        def on_start(self, state: TrainState) -> None:
            if dist.get_rank() == slow:
                state.model[0].register_forward_pre_hook(lambda module, arguments: time.sleep(0.05))

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megasparse.monitoring.monitor")
    logger.addHandler(handler)
    try:
        assert pretrain(parse_config(content), [Slow(), Monitor()]) == 0
    finally:
        logger.removeHandler(handler)
    return warnings


def test_slow_rank_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    content = configuration(run, write_data(tmp_path / "a", 200, seed=0), logging={
        "jsonl": True, "interval": 5, "report": False, "console": False, "wandb": {"mode": "disabled"},
    })  # fmt: skip
    content["training"]["steps"] = STEPS + 5
    warnings = run_distributed(2, "tests.monitoring.test_stragglers:run_with_a_slow_rank", content, 1)
    assert warnings[1] == []  # told once, by the writing rank
    named = [text for text in warnings[0] if text.startswith("SLOW: rank 1 on ")]
    assert len(named) == 1
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {record["perf/slowest_rank"] for record in records} == {1}
    for record in records:
        assert record["perf/own_time_s"] == pytest.approx(2 * 0.05, rel=1.0)  # two micro-batches
        assert record["perf/slowest_rank_ratio"] > 1.25
