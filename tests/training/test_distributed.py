"""Reading the launcher's environment."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megasparse.ranks import on_first_rank
from megasparse.training.distributed import say_once_for_each_layer
from megasparse.training.launch_environment import LaunchError, expand_nodelist, read_environment
from tests.launch import run_distributed

SRUN = {
    "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567",
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}  # fmt: skip


def test_plain_python_is_a_job_of_one() -> None:
    launch = read_environment({})
    assert (launch.launcher, launch.rank, launch.world_size) == ("python", 0, 1)
    # A batch script without srun has these two set, and is one process.
    assert read_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


def test_srun() -> None:
    launch = read_environment(SRUN)
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_rank) == ("srun", 9, 16, 1)
    assert (launch.local_world_size, launch.master_address, launch.master_port) == (8, "gpu07", 24567)
    assert read_environment({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "1"}).master_address == "head"


def test_torchrun_wins_over_srun() -> None:
    launch = read_environment({**SRUN, **TORCHRUN})
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_world_size) == ("torchrun", 3, 4, 2)
    assert (launch.master_address, launch.master_port) == ("node1", 29500)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is not set"),
        ({**TORCHRUN, "RANK": "two"}, "RANK='two' is not a number"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
    ],
)
def test_contradictions_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        read_environment(env)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("gpu[001-003,7],login", ["gpu001", "gpu002", "gpu003", "gpu7", "login"]),
        ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
        ("", []),
    ],
)
def test_nodelist(text: str, hosts: Any) -> None:
    assert expand_nodelist(text) == hosts


def speaks(tensor: int, pipeline: int) -> bool:
    """Whether this rank logs what happens to its layers."""
    log = logging.getLogger("megasparse.mlp")
    log.setLevel(logging.INFO)
    parallel_state.initialize_model_parallel(tensor, pipeline)
    say_once_for_each_layer()
    return log.isEnabledFor(logging.INFO)


@pytest.mark.parametrize(
    ("layout", "expected"), [((2, 1), [True, False]), ((1, 2), [True, True]), ((1, 1), [True, False])]
)
def test_one_rank_of_each_stage_speaks_for_its_layers(layout: tuple[int, int], expected: list[bool]) -> None:
    assert run_distributed(2, "tests.training.test_distributed:speaks", *layout) == expected


def ask_rank_0(numerator: int) -> tuple[int, int | str]:
    """This rank, and what rank 0 found."""
    rank = dist.get_rank()
    try:
        return rank, on_first_rank(lambda: numerator // rank if numerator else rank)
    except ZeroDivisionError as error:
        return rank, str(error)


def test_all_ranks_get_the_result_or_the_error_of_rank_0() -> None:
    assert run_distributed(2, "tests.training.test_distributed:ask_rank_0", 0) == [(0, 0), (1, 0)]
    (_, first), (_, second) = run_distributed(2, "tests.training.test_distributed:ask_rank_0", 1)
    assert first == second
    assert "zero" in str(first)
