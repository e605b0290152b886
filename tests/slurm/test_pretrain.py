"""slurm/pretrain.sbatch on a real SLURM: results, restarts, failures."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import STEPS, Workplace, alive, differences


def test_two_nodes_train_as_one_process(place: Workplace, uninterrupted: dict[int, dict[str, Any]]) -> None:
    assert differences(uninterrupted, place.alone("alone"), tolerance=1e-5) == []
    logs = next(place.run_directory("straight").glob("logs/*-0"))
    assert {path.name for path in logs.iterdir()} == {"exit", "job.log", "rank_00000.log", "rank_00001.log"}
    assert {path.read_text().split()[3] for path in (logs / "exit").iterdir()} == {"n1", "n2"}
    assert place.ends("straight")[-1]["reason"] == "done"


def test_time_limit_saves_requeues_and_finishes(
    place: Workplace, cluster: Cluster, limited: str, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    assert cluster.wait_for_end(limited) == "COMPLETED", place.log("limited")
    assert cluster.job(limited)["Restarts"] == "1"
    first, last = place.ends("limited")
    assert first["requeued"]
    assert re.fullmatch(r"SIGUSR1 after step [1-7]", first["reason"])  # early where the start was slow
    assert (last["requeued"], last["reason"]) == (False, "done")
    assert "resumed from" in place.log("limited")
    assert differences(place.metrics("limited"), uninterrupted) == []


def test_config_error_is_not_requeued(place: Workplace, cluster: Cluster) -> None:
    job = place.submit("mistaken", "model.num_layer=2")
    assert cluster.wait_for_end(job) == "FAILED"
    facts = cluster.job(job)
    assert (facts["Restarts"], facts["ExitCode"]) == ("0", "2:0")
    assert "num_layers" in place.log("mistaken")


def test_killed_rank_ends_the_job_and_is_named(
    place: Workplace, cluster: Cluster, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    job = place.submit("killed", hold=6)
    processes = place.wait_for_hold("killed")
    os.kill(processes[1], signal.SIGKILL)
    started = time.monotonic()
    wait_for("end of the other rank", lambda: not alive(processes[0]), 60, lambda: place.log("killed"))
    assert time.monotonic() - started < 60
    assert cluster.wait_for_end(job) == "COMPLETED", place.log("killed")
    assert "first failure: rank 1 on n2, code 137 (signal 9)" in place.log("killed")
    assert cluster.job(job)["ExcNodeList"] == "n2"
    assert [end["nodes"] for end in place.ends("killed")] == ["n[1-2]", "n[1,3]"]
    assert differences(place.metrics("killed"), uninterrupted) == []


def test_scancel_signal_saves_and_requeues(
    place: Workplace, cluster: Cluster, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    job = place.submit("signalled", hold=5)
    place.wait_for_hold("signalled")
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait_for_end(job) == "COMPLETED", place.log("signalled")
    assert place.ends("signalled")[0]["reason"] == "SIGUSR1 after step 5"
    assert max(place.metrics("signalled")) == STEPS
    assert differences(place.metrics("signalled"), uninterrupted) == []
