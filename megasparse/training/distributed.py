"""Who this process is in the job, and the process groups: under torchrun, under srun, or alone.

The environment is read once (`read_environment`), before any process group exists, so that configuration errors of
the layout are found first. NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import datetime
import os
import random
import re
import socket
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megasparse.config import Config

FIRST_PORT = 20000
"""SLURM jobs rendezvous at FIRST_PORT + job id % 10000: below the ephemeral range, and two jobs rarely agree."""


_joined: list[str] = []
"""Not empty where `initialize` made the default process group, rather than finding one."""


class LaunchError(RuntimeError):
    """The launcher's environment does not make sense. The message says which variable and what to do."""


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
        return f"rank {self.rank} of {self.world_size} (local rank {self.local_rank} on {socket.gethostname()})"


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


def device_of(launch: Launch) -> torch.device:
    """The device of this process: one GPU each where there are GPUs.

    Raises:
        LaunchError: fewer GPUs are visible than processes run on this node.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:  # the launcher binds one GPU to each process
        return torch.device("cuda", 0)
    if launch.local_rank >= visible:
        raise LaunchError(
            f"{launch}: {visible} GPUs are visible for {launch.local_world_size} processes; start as many processes "
            "per node as there are GPUs (torchrun --nproc-per-node, srun --ntasks-per-node, --gpus-per-node)"
        )
    return torch.device("cuda", launch.local_rank)


def initialize(cfg: Config, launch: Launch) -> torch.device:
    """Joins the job, makes Megatron's process groups and seeds. `cfg.validate(world_size)` must have passed.

    Raises:
        LaunchError: the other processes could not be reached.
    """
    device = device_of(launch)
    if device.type == "cuda":
        if cfg.parallel.tensor > 1 or cfg.parallel.context > 1:
            # Lets communication kernels start in issue order beside compute (Megatron's advice up to Hopper).
            # CUDA reads it when its context is made, so it comes first.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    else:
        share = max(1, (os.cpu_count() or 1) // launch.local_world_size)
        if "OMP_NUM_THREADS" not in os.environ or launch.launcher != "torchrun":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=cfg.parallel.timeout_minutes)
    try:
        if dist.is_initialized():
            return _make_groups(cfg, device)  # its caller's, who runs this inside a program of their own
        if launch.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(
                backend,
                init_method=f"tcp://{launch.master_address}:{launch.master_port}"
                if launch.launcher != "torchrun"
                else "env://",
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"{launch}: cannot meet the others at {launch.master_address}:{launch.master_port}: {error}\n"
            "Is the address that of the first node, is the port free, did all processes start? "
            "Set MASTER_ADDR and MASTER_PORT to choose others."
        ) from error
    _joined.append(backend)
    return _make_groups(cfg, device)


def _make_groups(cfg: Config, device: torch.device) -> torch.device:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=cfg.parallel.tensor,
        pipeline_model_parallel_size=cfg.parallel.pipeline,
        virtual_pipeline_model_parallel_size=cfg.parallel.virtual_pipeline
        if (cfg.parallel.virtual_pipeline or 1) > 1
        else None,
        context_parallel_size=cfg.parallel.context,
        distributed_timeout_minutes=max(1, int(cfg.parallel.timeout_minutes)),
    )
    seed_everything(cfg)
    return device


def seed_everything(cfg: Config) -> None:
    """Random states of this rank. Weights and data do not depend on them; dropout does."""
    seed = cfg.training.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if cfg.training.deterministic:
        torch.use_deterministic_algorithms(True)


def shut_down() -> None:
    """Undoes `initialize`."""
    parallel_state.destroy_model_parallel()
    if _joined:
        _joined.clear()
        dist.destroy_process_group()
