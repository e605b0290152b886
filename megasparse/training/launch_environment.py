"""Who this process is in the job: under torchrun, under srun, or alone. Imports neither torch nor Megatron.

The environment is read once, before any process group exists, so that configuration errors of the layout, and nodes
on which a library is broken, are found first.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from megasparse.host import host_name

FIRST_PORT = 20000
"""SLURM jobs rendezvous at FIRST_PORT + job id % 10000: below the ephemeral range, and two jobs rarely agree."""


class LaunchError(RuntimeError):
    """The launcher's environment does not make sense. The message says which variable and what to do."""

    @property
    def exit_code(self) -> int:
        """Of `megasparse`: 1, which launchers try again, where the variables were fine and the network was not."""
        return 2 if self.__cause__ is None else 1


@dataclass(frozen=True)
class Launch:
    """One process of the job. `launcher` is "torchrun", "srun" or "python"."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int

    @property
    def is_first_of_node(self) -> bool:
        return self.local_rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} (local rank {self.local_rank} on {host_name()})"


def read_environment(env: dict[str, str] | None = None) -> Launch:
    """Reads what the launcher says. torchrun's variables win over SLURM's, as torchrun may run inside srun.

    Raises:
        LaunchError: variables are missing, are not numbers, or contradict each other.
    """
    env = dict(os.environ) if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        launch = Launch(
            launcher="torchrun",
            rank=_number(env, "RANK"),
            world_size=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK", 0),
            local_world_size=_number(env, "LOCAL_WORLD_SIZE", 1),
            master_address=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_number(env, "MASTER_PORT"),
        )
    elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        # SLURM_STEP_NUM_TASKS is set by srun alone: plain python in a batch script is a job of one process.
        nodes = expand_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
        job = _number(env, "SLURM_JOB_ID", 0)
        launch = Launch(
            launcher="srun",
            rank=_number(env, "SLURM_PROCID"),
            world_size=_number(env, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(env, "SLURM_LOCALID"),
            local_world_size=_tasks_on_node(env),
            master_address=env.get("MASTER_ADDR") or (nodes[0] if nodes else "127.0.0.1"),
            master_port=_number(env, "MASTER_PORT", FIRST_PORT + job % 10000),
        )
    else:
        launch = Launch("python", 0, 1, 0, 1, "127.0.0.1", 0)
    if not 0 <= launch.rank < launch.world_size:
        raise LaunchError(
            f"{launch.launcher} says rank {launch.rank} of {launch.world_size}: check RANK/WORLD_SIZE "
            "(leftovers of another job in the environment?)"
        )
    return launch


def _number(env: dict[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise LaunchError(f"{name} is not set, though other variables of the launcher are; use torchrun or srun")
        return default
    if not text.isdigit():
        raise LaunchError(f"{name}={text!r} is not a number")
    return int(text)


def _tasks_on_node(env: dict[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE is like `8(x4),6`; the entry of this node counts."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else counts[0] if counts else 1


def expand_nodelist(text: str) -> list[str]:
    """`gpu[001-003,7],login` -> [gpu001, gpu002, gpu003, gpu7, login] (one bracket a name, as SLURM writes them)."""
    hosts: list[str] = []
    for name, inside, tail in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        if not inside:
            hosts.append(name + tail)
            continue
        for part in inside.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                hosts.append(f"{name}{number:0{len(first)}d}{tail}")
    return hosts
