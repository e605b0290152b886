"""One SLURM cluster and one data set for the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.slurm.runs import Workplace


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster of three nodes, where asked for: its jobs take about ten minutes in all."""
    if os.environ.get("MEGASPARSE_TEST_SLURM") != "1":
        pytest.skip("set MEGASPARSE_TEST_SLURM=1 to start a SLURM cluster here (tools/install_slurm.sh installs it)")
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


@pytest.fixture(scope="session")
def limited(place: Workplace) -> str:
    """The number of a job whose time limit comes before its end; it runs beside the other jobs, on the same nodes."""
    return place.submit("limited", hold=7, flags=("--time=2", "--signal=B:USR1@100"))


@pytest.fixture(scope="session")
def uninterrupted(place: Workplace, limited: str) -> dict[int, dict[str, Any]]:
    """Metrics of the two-node run that nothing disturbs, though another job runs on its nodes."""
    job = place.submit("straight")
    assert place.cluster.wait_for_end(job) == "COMPLETED", place.log("straight")
    return place.metrics("straight")
