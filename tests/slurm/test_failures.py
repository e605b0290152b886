"""A node that dies, a loss that stays not finite, a user who stops a run; torchrun."""

from __future__ import annotations

from typing import Any

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import STEPS, Workplace, differences


def test_torchrun_trains_the_same_after_the_preflight_check(
    place: Workplace, cluster: Cluster, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    job = place.submit("elastic", MEGASPARSE_LAUNCHER="torchrun", MEGASPARSE_PREFLIGHT="1")
    assert cluster.wait_for_end(job) == "COMPLETED", place.log("elastic")
    assert "0 failed" in place.log("elastic")
    assert differences(place.metrics("elastic"), uninterrupted) == []


def test_not_finite_is_not_requeued(place: Workplace, cluster: Cluster) -> None:
    job = place.submit("diverged", "optimizer.lr=1e30", "training.steps=60", nodes=1)
    stopped = place.submit("stopped", nodes=1, hold=5)
    place.wait_for_hold("stopped", ranks=1)
    (place.run_directory("stopped") / "stop").touch()
    assert cluster.wait_for_end(job) == "FAILED", place.log("diverged")
    facts = cluster.job(job)
    assert (facts["Restarts"], facts["ExitCode"]) == ("0", "65:0"), place.log("diverged")
    assert cluster.wait_for_end(stopped) == "COMPLETED", place.log("stopped")
    assert cluster.job(stopped)["Restarts"] == "0"
    assert max(place.metrics("stopped")) == 5


def test_dead_node_requeues_without_it(place: Workplace, cluster: Cluster, limited: str) -> None:
    cluster.wait_for_end(limited)  # the node must be no other job's
    job = place.submit("orphaned", hold=6)
    processes = place.wait_for_hold("orphaned")
    assert cluster.job(job)["NodeList"] == "n[1-2]"
    cluster.kill_node("n2", processes[1])
    try:
        assert cluster.wait_for_end(job) == "COMPLETED", place.log("orphaned")
        assert cluster.job(job)["NodeList"] == "n[1,3]"
        assert int(cluster.job(job)["Restarts"]) >= 1
        assert max(place.metrics("orphaned")) == STEPS
    finally:
        cluster.start_node("n2")
        wait_for("n2 back", lambda: "n2" in cluster.idle_nodes(), 60, cluster.logs)
