"""Who is named when a run does not get on. A rank that really hangs: tests/slurm/test_failures.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megasparse.training.heartbeat import HANG_FILE, Beat, Heartbeat, verdict
from tests.launch import run_distributed
from tests.training.cases import configuration


def beats(*places: tuple[int, str], ages: dict[int, float] | None = None) -> list[Beat]:
    """One rank a host, seen at time 1000 minus its age."""
    return [
        Beat(rank, f"n{rank}", 1000.0 - (ages or {}).get(rank, 1.0), step, phase, 900.0)
        for rank, (step, phase) in enumerate(places)
    ]


@pytest.mark.parametrize(
    ("seen", "named", "hosts"),
    [
        # A process that does not run any more is to blame, wherever the others are.
        (beats((3, "training"), (3, "training"), (3, "training"), ages={1: 90.0}), "rank 1 on n1: no sign", ["n1"]),
        # All run: the others wait for the one that is behind, though it is two phases only.
        (beats((3, "training"), (3, "reading data"), (3, "training")), "rank 1 on n1: behind all others", ["n1"]),
        (beats((3, "training"), (3, "training"), (2, "checkpoint")), "rank 2 on n2: behind all others", ["n2"]),
        # Most of them cannot be done without.
        (beats((3, "training"), (2, "training"), (2, "training")), "rank 1 on n1, rank 2 on n2: behind", []),
        (beats((3, "training"), (3, "training")), "all ranks stand at the same point (step 3, training)", []),
    ],
)
def test_verdict(seen: list[Beat], named: str, hosts: list[str]) -> None:
    reason, without = verdict(seen, now=1000.0, silent_after=40.0)
    assert reason.startswith(named)
    assert without == hosts


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_report_appears_when_nothing_moves_and_goes_away_when_it_does(tmp_path: Path) -> None:
    report = tmp_path / HANG_FILE
    with (
        Heartbeat(tmp_path, 0, 2, "n0", timeout_seconds=0.5) as first,
        Heartbeat(tmp_path, 1, 2, "n1", timeout_seconds=3600.0) as second,
    ):
        second._write(Beat(1, "n1", time.time() + 3600, 5, "reading data", time.time()))
        first.at(5, "training")
        wait_until(report.exists)
        wait_until(lambda: report.read_text().endswith("}"))
        content = json.loads(report.read_text())
        assert content["reason"].startswith("rank 1 on n1: behind all others, last at step 5, reading data; waited ")
        assert content["hosts"] == "n1"
        first.at(6, "training")
        wait_until(lambda: not report.exists())


@pytest.mark.parametrize(("before", "now"), [(False, None), (False, ""), (True, None)])
def test_a_rank_that_left_no_beat_is_named(tmp_path: Path, before: bool, now: str | None) -> None:
    """Of a node that dies, a parallel file system may keep the file's name and lose its content (`now`). Where the rank
    ran in the attempt before is no concern of this one (`before`)."""
    file = tmp_path / "heartbeat" / "rank_00001.json"
    file.parent.mkdir()
    if before:
        file.write_text(json.dumps(asdict(Beat(1, "n7", time.time() - 60, 90, "training", time.time() - 60))))
    with Heartbeat(tmp_path, 0, 2, "n0", timeout_seconds=0.5) as alone:
        if now is not None:
            file.parent.mkdir(exist_ok=True)
            file.write_text(now)
        alone.at(5, "training")
        wait_until((tmp_path / HANG_FILE).exists)
        wait_until(lambda: (tmp_path / HANG_FILE).read_text().endswith("}"))
        content = json.loads((tmp_path / HANG_FILE).read_text())
    assert content["reason"].startswith("rank 1: no sign of life at all; waited")
    assert content["hosts"] == ""


def phases_of_a_run(data: dict[str, Any]) -> list[tuple[int, str]]:
    from megasparse.config import parse_config
    from megasparse.training.loop import pretrain

    phases: list[tuple[int, str]] = []
    at = Heartbeat.at

    def noted(self: Heartbeat, step: int, phase: str) -> None:
        phases.append((step, phase))
        at(self, step, phase)

    Heartbeat.at = noted  # type: ignore[method-assign]
    try:
        pretrain(parse_config(data), [])
    finally:
        Heartbeat.at = at  # type: ignore[method-assign]
    return phases


def test_every_batch_of_a_validation_is_progress(tmp_path: Path, data_folder: Path) -> None:
    """A long one must not look like a collective that does not come back."""
    data = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 5, "eval_steps": 3})
    (phases,) = run_distributed(1, "tests.training.test_heartbeat:phases_of_a_run", data)
    assert [phase for step, phase in phases if phase == "validation"] == 3 * ["validation"]


def test_one_process_has_no_heartbeat(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 0, 1, "n0", timeout_seconds=0.1) as alone:
        alone.at(1, "training")
        time.sleep(0.3)
    assert list(tmp_path.iterdir()) == []
