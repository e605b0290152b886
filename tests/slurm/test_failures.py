"""What pretrain.sbatch does about mistakes, dead ranks and nodes, hangs, divergence, preemption and users who stop."""

from __future__ import annotations

import re
from typing import Any

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import STEPS, Workplace, alive, differences


def test_mistake_in_the_configuration_is_not_requeued(
    place: Workplace, cluster: Cluster, mistaken: tuple[str, str]
) -> None:
    job, after = mistaken
    assert cluster.wait_for_end(job) == "FAILED"
    facts = cluster.job(job)
    assert (facts["Restarts"], facts["ExitCode"]) == ("0", "2:0")
    assert "num_layers" in place.log("mistaken")
    assert cluster.wait_for_end(after) == "CANCELLED"


def test_killed_rank_ends_the_job_and_is_named(
    place: Workplace, cluster: Cluster, killed: str, killed_rank: dict[int, int],
    uninterrupted: dict[int, dict[str, Any]],
) -> None:  # fmt: skip
    wait_for("end of the other rank", lambda: not alive(killed_rank[0]), 60, lambda: place.log("killed"))
    assert cluster.wait_for_end(killed) == "COMPLETED", place.log("killed")
    assert "first failure: rank 1 on n2, code 137 (signal 9)" in place.log("killed")
    assert cluster.job(killed)["ExcNodeList"] == "n2"
    assert [end["nodes"] for end in place.ends("killed")] == ["n[1-2]", "n[1,3]"]
    assert differences(place.metrics("killed"), uninterrupted) == []


def test_dead_node_requeues_without_it(
    place: Workplace, cluster: Cluster, orphaned: str, dead_node: str, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    assert dead_node == "n[4-5]"
    assert cluster.wait_for_end(orphaned) == "COMPLETED", place.log("orphaned")
    assert "Node failure on n5" in place.log("orphaned")
    facts = cluster.job(orphaned)
    assert facts["NodeList"] == "n[4,6]"
    assert int(facts["Restarts"]) >= 1
    assert differences(place.metrics("orphaned"), uninterrupted) == []


def test_hung_rank_ends_the_job_and_is_named(place: Workplace, cluster: Cluster, hung: str, frozen_rank: None) -> None:
    assert cluster.wait_for_end(hung) == "FAILED", place.log("hung")
    [end] = place.ends("hung")
    assert not end["requeued"]
    assert end["reason"].startswith("rank 1 on n2: no sign of life"), end
    assert end["reason"].endswith("already requeued 0 times (MEGASPARSE_MAX_REQUEUES)")


def test_crashes_without_a_new_checkpoint_are_bounded(place: Workplace, cluster: Cluster, crashing: str) -> None:
    assert cluster.wait_for_end(crashing) == "FAILED", place.log("crashing")
    assert cluster.job(crashing)["Restarts"] == "1"
    first, second = (end["reason"] for end in place.ends("crashing"))
    assert first == "rank 0 failed with code 3"
    assert second == f"{first}; failure 2 without a new checkpoint (MEGASPARSE_MAX_FAILURES)"


def test_loss_that_stays_not_finite_is_not_requeued(place: Workplace, cluster: Cluster, diverged: str) -> None:
    assert cluster.wait_for_end(diverged) == "FAILED", place.log("diverged")
    facts = cluster.job(diverged)
    assert (facts["Restarts"], facts["ExitCode"]) == ("0", "65:0"), place.log("diverged")
    assert "step 10 in a row without an update" in place.log("diverged")


def test_preempted_job_saves_and_continues(place: Workplace, cluster: Cluster, preempted: str, preemption: str) -> None:
    assert cluster.wait_for_end(preempted) == "COMPLETED", place.log("preempted")
    assert cluster.state(preemption) == "COMPLETED"
    assert [end["reason"] for end in place.ends("preempted")] == ["SIGTERM after step 6", "done"]
    assert sorted(place.metrics("preempted")) == list(range(1, STEPS + 1))


def test_user_stops_a_run_in_a_container(place: Workplace, cluster: Cluster, stopped: str, stop_file: None) -> None:
    assert cluster.wait_for_end(stopped) == "COMPLETED", place.log("stopped")
    assert cluster.job(stopped)["Restarts"] == "0"
    assert max(place.metrics("stopped")) == 5
    assert re.search("not requeued: stopped by the file", place.log("stopped"))
    called = (place.directory / "apptainer.arguments-0").read_text().splitlines()
    where, python = str(place.directory), str(place.checkout / "tests" / "slurm" / "paced_python")
    mounts = f"{place.checkout}:{place.checkout},{where}:{where},/data:/data"
    assert called[:8] == ["exec", "--nv", "--bind", mounts, "--pwd", where, "an image.sif", python]
    assert called[8:] == ["-m", "megasparse", "pretrain", "tiny.yaml", "run.name='stopped'"]
