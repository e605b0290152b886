"""One SLURM cluster and one data set for the session; every job of the selected tests, submitted and disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.cluster import Cluster, wait_for, why_not
from tests.slurm.runs import ROOT, Workplace

SUBMITTED = (
    "limited", "straight", "killed", "hung", "orphaned", "elastic", "swept", "preempted", "stopped", "diverged",
    "crashing", "mistaken", "tokenised",
)  # fmt: skip
"""Fixtures that submit jobs. Those of the selected tests all start before any test waits: the machine is kept busy."""
DISTURBED = (
    "shared_nodes", "frozen_rank", "killed_rank", "dead_node", "stop_file", "signalled_task", "preemption",
    "signalled_job",
)  # fmt: skip
"""Fixtures that wait for a job to hold and do something to it; in the order in which they hold the machine up least."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for most of what all of them need."""
    for item in items:
        if "place" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Where jobs are submitted; its path has a space."""
    return Workplace(cluster, Path(tmp_path_factory.mktemp("work place")))


@pytest.fixture(autouse=True)
def everything_started(request: pytest.FixtureRequest) -> None:
    """Submits the jobs of all selected tests, and disturbs them, before the first of these tests."""
    if "place" in request.fixturenames:
        wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
        for name in (*SUBMITTED, *DISTURBED):
            if name in wanted:
                with contextlib.suppress(AssertionError):  # it fails again in the tests that need it
                    request.getfixturevalue(name)


@pytest.fixture(scope="session")
def limited(place: Workplace) -> list[str]:
    """`megasparse launch` of a run whose time limit comes before its end, of its evaluation and its conversion.

    Their numbers.
    """
    small = {"ntasks-per-node": 1, "cpus-per-task": 1, "gpus-per-node": 0, "mem": 100, "exclusive": False,
             "oversubscribe": True, "time": 4}  # fmt: skip
    site = {"MEGASPARSE_SITE": str(place.checkout / "slurm" / "site.sh")}
    evaluate = {
        "job": "evaluate", "name": "judged", "arguments": ["runs/limited", "training.eval_steps=2"],
        "sbatch": {**small, "nodes": 2}, "environment": site,
    }  # fmt: skip
    convert = {
        "job": "convert", "name": "exported", "sbatch": small, "environment": site,
        "arguments": ["runs/limited", "exported model", "--verify", "--verify-tokens=64"],
    }  # fmt: skip
    job = {
        "job": "pretrain", "name": "limited", "arguments": ["tiny.yaml", "logging.wandb.mode=offline"],
        "sbatch": {**small, "nodes": 2, "signal": "B:USR1@180"},
        "environment": {**site, "MEGASPARSE_TEST_HOLD": 7}, "then": [evaluate, convert],
    }  # fmt: skip
    (place.directory / "job.yaml").write_text(yaml.safe_dump(job))
    return [line.split()[0] for line in place.command("launch", "job.yaml").splitlines()]


@pytest.fixture(scope="session")
def straight(place: Workplace) -> str:
    """A two-node run that nothing disturbs."""
    return place.submit("straight", hold=6)


@pytest.fixture(scope="session")
def killed(place: Workplace) -> str:
    """A two-node run."""
    return place.submit("killed", hold=6)


@pytest.fixture(scope="session")
def shared_nodes(place: Workplace, straight: str, killed: str) -> list[dict[str, Any]]:
    """What `megasparse status` says of two jobs at the moment at which all their ranks train."""
    for name in ("straight", "killed"):
        place.wait_for_hold(name)
    told = place.command("status", "runs/straight", "runs/killed", "--json")
    place.release("straight")
    return [json.loads(line) for line in told.splitlines()]


@pytest.fixture(scope="session")
def uninterrupted(place: Workplace, straight: str, shared_nodes: Any) -> dict[int, dict[str, Any]]:
    """Metrics of the undisturbed run."""
    assert place.cluster.wait_for_end(straight) == "COMPLETED", place.log("straight")
    return place.metrics("straight")


@pytest.fixture(scope="session")
def killed_rank(place: Workplace, killed: str, shared_nodes: Any) -> dict[int, int]:
    """Process ids of the ranks of `killed`, after SIGKILL of rank 1."""
    processes = place.wait_for_hold("killed")
    os.kill(processes[1], signal.SIGKILL)
    return processes


@pytest.fixture(scope="session")
def hung(place: Workplace) -> str:
    """A run that gives up when a collective does not end within a minute; it must not be requeued."""
    return place.submit("hung", "parallel.timeout_minutes=1", hold=6, MEGASPARSE_MAX_REQUEUES="0")


@pytest.fixture(scope="session")
def frozen_rank(place: Workplace, hung: str) -> None:
    """Rank 1 of `hung` stops without a word; rank 0 goes on into the next collective."""
    processes = place.wait_for_hold("hung")
    os.kill(processes[1], signal.SIGSTOP)
    place.release("hung")


@pytest.fixture(scope="session")
def orphaned(place: Workplace) -> str:
    """A run that loses a node."""
    return place.submit("orphaned", hold=6, flags=("--partition=frail",))


@pytest.fixture(scope="session")
def dead_node(place: Workplace, cluster: Cluster, orphaned: str) -> str:
    """The nodes that `orphaned` ran on; the second of them, n5, is dead."""
    processes = place.wait_for_hold("orphaned")
    nodes = cluster.job(orphaned)["NodeList"]
    cluster.kill_node("n5", processes[1])
    return nodes


@pytest.fixture(scope="session")
def elastic(place: Workplace) -> str:
    """A run under torchrun; on n2, which it gets first, it finds a folder that cannot be written."""
    return place.submit(
        "elastic", "data.cache_dir=$NODE_CACHE/index", hold=5, MEGASPARSE_TEST_HOLD_ATTEMPT="1",
        MEGASPARSE_TEST_BROKEN_NODE="n2", MEGASPARSE_LAUNCHER="torchrun", MEGASPARSE_PREFLIGHT="1",
    )  # fmt: skip


@pytest.fixture(scope="session")
def signalled_job(place: Workplace, cluster: Cluster, elastic: str) -> None:
    """The second attempt of `elastic` gets `scancel --signal=USR1`."""
    place.wait_for_hold("elastic")
    cluster.run("scancel", "--signal=USR1", elastic)


@pytest.fixture(scope="session")
def swept(place: Workplace) -> str:
    """An array of two tasks, a coefficient each."""
    return place.submit(
        "swept", "run.directory=sweep runs/coefficient", script="sweep.sbatch", nodes=1, hold=5,
        flags=("--array=0-1",), MEGASPARSE_SWEEP_VALUES="1e-4 3e-3",
    )  # fmt: skip


@pytest.fixture(scope="session")
def signalled_task(place: Workplace, cluster: Cluster, swept: str) -> None:
    """The last task of `swept`, whose number is also that of the array, gets SIGUSR1; the first one goes on."""
    for value in ("1e-4", "3e-3"):
        place.wait_for_hold(f"../sweep runs/coefficient-{value}", ranks=1)
    cluster.run("scancel", "--signal=USR1", f"{swept}_1")
    place.release("../sweep runs/coefficient-1e-4")


@pytest.fixture(scope="session")
def preempted(place: Workplace) -> str:
    """A run on a node that others may take."""
    return place.submit("preempted", nodes=1, hold=6, flags=("--partition=spare",))


@pytest.fixture(scope="session")
def preemption(place: Workplace, cluster: Cluster, preempted: str) -> str:
    """The job that takes the node."""
    place.wait_for_hold("preempted", ranks=1)
    flags = ("--partition=urgent", "--nodes=1", "--exclusive", "--output=urgent.out", f"--chdir={place.directory}")
    job = cluster.run("sbatch", "--parsable", *flags, "--wrap=sleep 1").strip()
    wait_for("the signal", lambda: "CANCELLED AT" in place.log("preempted"), 120, lambda: place.log("preempted"))
    place.release("preempted")
    return job


@pytest.fixture(scope="session")
def stopped(place: Workplace) -> str:
    """A run that a user stops, in what it takes for a container."""
    programs = f"{ROOT / 'tests' / 'slurm'}{os.pathsep}{os.environ['PATH']}"
    return place.submit(
        "stopped", nodes=1, hold=5, PATH=programs, MEGASPARSE_CONTAINER="an image.sif",
        MEGASPARSE_CONTAINER_RUNTIME="apptainer", MEGASPARSE_MOUNTS="/data:/data",
    )  # fmt: skip


@pytest.fixture(scope="session")
def stop_file(place: Workplace, stopped: str) -> None:
    """`touch RUN/stop`."""
    place.wait_for_hold("stopped", ranks=1)
    (place.run_directory("stopped") / "stop").touch()


@pytest.fixture(scope="session")
def diverged(place: Workplace) -> str:
    """A run whose loss stays not finite; nothing of the submitting environment reaches it."""
    return place.submit("diverged", "optimizer.lr=1e30", "training.steps=60", nodes=1, flags=("--export=NONE",))


@pytest.fixture(scope="session")
def crashing(place: Workplace) -> str:
    """A run that never comes to its first checkpoint; it may try twice."""
    return place.submit("crashing", nodes=1, MEGASPARSE_TEST_CRASH="3", MEGASPARSE_MAX_FAILURES="2")


@pytest.fixture(scope="session")
def mistaken(place: Workplace) -> tuple[str, str]:
    """A run with a mistake in its configuration, and a conversion that waits for it."""
    job = place.submit("mistaken", "model.num_layer=2")
    after = place.submit(
        "never", "exported nothing", script="convert.sbatch", config="runs/mistaken", nodes=1,
        flags=(f"--dependency=afterok:{job}",),
    )  # fmt: skip
    return job, after


@pytest.fixture(scope="session")
def tokenised(place: Workplace) -> tuple[str, str]:
    """An array that tokenises three files in two shares, and one that looks for a folder which is not there."""
    from megasparse.data.preprocess import PreprocessOptions, preprocess

    raw = place.directory / "raw text"
    (raw / "more").mkdir(parents=True)
    (raw / "a b.txt").write_text("the sun rises over the quiet hills\n" * 20)
    (raw / "more" / "part.txt").write_text("water runs down to the sea\n" * 30)
    (raw / "z.jsonl").write_text('{"text": "one line"}\n{"text": "another line of text"}\n' * 10)
    words = place.directory / "words"
    preprocess(PreprocessOptions([str(raw)], place.directory / "all", train_vocab_size=300, tokenizer_output=words))
    job = place.submit(
        "tokenised", "raw text", "--tokenizer", "words", script="preprocess.sbatch", config="data sets/corpus",
        nodes=1, flags=("--array=0-1",),
    )  # fmt: skip
    lost = place.submit(
        "absent", "no such folder", "--tokenizer", "words", script="preprocess.sbatch", config="data sets/none",
        nodes=1, flags=("--array=0",),
    )  # fmt: skip
    return job, lost
