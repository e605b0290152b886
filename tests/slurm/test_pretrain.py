"""slurm/pretrain.sbatch on a real SLURM: what it computes, how it comes back."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.slurm.cluster import Cluster
from tests.slurm.runs import Workplace, differences


def test_two_nodes_train_as_one_process(place: Workplace, uninterrupted: dict[int, dict[str, Any]]) -> None:
    place.alone("pretrain", "tiny.yaml", "run.name=alone")
    assert differences(uninterrupted, place.metrics("alone"), tolerance=1e-5) == []
    logs = next(place.run_directory("straight").glob("logs/*-0"))
    assert {path.name for path in logs.iterdir()} == {"exit", "job.log", "rank_00000.log", "rank_00001.log"}
    assert {path.read_text().split()[3] for path in (logs / "exit").iterdir()} == {"n1", "n2"}
    assert place.ends("straight")[-1]["reason"] == "done"


def test_two_jobs_share_nodes(place: Workplace, straight: str, killed: str, shared_nodes: list[dict[str, Any]]) -> None:
    told = [(status["job"], status["state"], status["nodes"], status["step"]) for status in shared_nodes]
    assert told == [(straight, "RUNNING", "n[1-2]", 5), (killed, "RUNNING", "n[1-2]", 5)]
    ports = [re.findall(r"rendezvous \S+:(\d+)", place.log(name))[0] for name in ("straight", "killed")]
    assert ports[0] != ports[1]


def test_time_limit_saves_requeues_and_finishes(
    place: Workplace, cluster: Cluster, limited: list[str], uninterrupted: dict[int, dict[str, Any]]
) -> None:
    job = limited[0]
    assert cluster.wait_for_end(job) == "COMPLETED", place.log("limited")
    assert cluster.job(job)["Restarts"] == "1"
    first, last = place.ends("limited")
    assert first["requeued"]
    assert re.fullmatch(r"(SIGUSR1|TIME_LIMIT) after step [1-7]", first["reason"])  # early where the start was slow
    assert (last["requeued"], last["reason"]) == (False, "done")
    assert "resumed from" in place.log("limited")
    assert differences(place.metrics("limited"), uninterrupted) == []


def test_wandb_run_stays_one_over_a_requeue(place: Workplace, cluster: Cluster, limited: list[str]) -> None:
    from megasparse.training.checkpoint import dist_checkpointing

    assert cluster.wait_for_end(limited[0]) == "COMPLETED", place.log("limited")
    run = place.run_directory("limited")
    number = json.loads((run / "wandb.json").read_text())["run_id"]
    newest, superseded = (list(run.glob(f"{folder}/offline-run-*")) for folder in ("wandb", "wandb-superseded"))
    assert [len(newest), len(superseded)] == [1, 1]
    assert {path.name.rsplit("-", 1)[1] for path in (*newest, *superseded)} == {number}
    saved = [dist_checkpointing.load_common_state_dict(str(path)) for path in run.glob("checkpoints/step_*")]
    assert {content["run"]["wandb_run_id"] for content in saved} == {number}


def test_torchrun_leaves_a_bad_node_and_continues_after_a_signal(
    place: Workplace, cluster: Cluster, elastic: str, signalled_job: None, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    assert cluster.wait_for_end(elastic) == "COMPLETED", place.log("elastic")
    ends = [(end["reason"], end["nodes"]) for end in place.ends("elastic")]
    assert ends == [
        ("the check of the nodes failed on n2", "n[1-2]"), ("SIGUSR1 after step 5", "n[1,3]"), ("done", "n[1,3]")
    ]  # fmt: skip
    assert cluster.job(elastic)["ExcNodeList"] == "n2"
    assert "cannot write to /proc" in place.log("elastic")
    assert differences(place.metrics("elastic"), uninterrupted) == []
