"""Two starts in one run directory, and the lock of a run that was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megasparse.ranks import StorageError
from megasparse.training.run_lock import RunLockedError, run_lock
from tests.launch import run_distributed
from tests.training.forked import ROOT

HOLDER = """
import sys, time, torch.distributed as dist
from pathlib import Path
from megasparse.training.run_lock import run_lock

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with run_lock(*map(Path, sys.argv[1:])):
    print("locked", flush=True)
    time.sleep(60)
"""


def enter(directory: str, patience: float, *others: str) -> str:
    """What stands in the way of a run there, if anything; else the lock is taken and freed twice."""
    try:
        for _ in range(2):
            with run_lock(Path(directory), *map(Path, others), patience=patience):
                pass
    except (RunLockedError, StorageError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_run_waits_then_ends_and_a_killed_one_leaves_no_lock(world: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for problem in run_distributed(world, "tests.training.test_run_lock:enter", str(tmp_path / "run"), 0.5):
            assert f"run: process {holder.pid} on " in problem
            assert "choose another run.name" in problem
        holder.kill()
    assert run_distributed(world, "tests.training.test_run_lock:enter", str(tmp_path / "run"), 10.0) == [""] * world


def test_two_runs_with_one_checkpoint_directory(tmp_path: Path) -> None:
    """The second would remove what the first is writing."""
    shared, link = tmp_path / "checkpoints", tmp_path / "link"
    link.symlink_to(shared)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "a"), str(shared), str(link)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        target = "tests.training.test_run_lock:enter"
        [problem] = run_distributed(1, target, str(tmp_path / "b"), 0.5, str(shared))
        assert problem.startswith(f"{shared}: process {holder.pid} on ")
        assert f"(run directory {tmp_path / 'a'}) trains there" in problem
        assert "choose another checkpoint.directory" in problem
        holder.kill()


def test_a_file_system_that_fails_rank_0_ends_all_ranks(tmp_path: Path) -> None:
    """Where only rank 0 raised, the others would wait for it until their time limit."""
    (tmp_path / "runs").touch()
    for problem in run_distributed(2, "tests.training.test_run_lock:enter", str(tmp_path / "runs" / "a"), 0.5):
        assert problem.startswith("rank 0 on ")
        assert problem.endswith(f"{tmp_path}/runs/a: Not a directory")
