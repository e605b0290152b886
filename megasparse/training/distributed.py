"""The process groups of a job, its devices and its seeds. NCCL on GPUs, gloo on CPUs.

Who this process is in the job: `launch_environment.read_environment`.
"""

from __future__ import annotations

import datetime
import logging
import os
import random

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megasparse.config import Config
from megasparse.training.launch_environment import Launch, LaunchError

_joined: list[str] = []
"""Not empty where `initialize` made the default process group, rather than finding one."""


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
    if cfg.training.deterministic:
        _make_deterministic()
    if device.type == "cuda":
        if cfg.parallel.tensor > 1 or cfg.parallel.context > 1:
            # Lets communication kernels start in issue order beside compute (Megatron's advice up to Hopper).
            # CUDA reads it when its context is made, so it comes first.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if cfg.training.cuda_graphs:
            # Else NCCL registers the buffers of captured communication, which fails for memory of expandable segments.
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
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
            )
        if device.type == "cuda":
            # Makes the communicator of all ranks: who cannot be reached is missed here. Those of Megatron's groups are
            # made when first used: with `device_id` above NCCL would make all of them now, used or not, which takes
            # 4.5 GiB more of each of two H200s under TP 2.
            dist.barrier(device_ids=[device.index])
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
        virtual_pipeline_model_parallel_size=cfg.parallel.chunks if cfg.parallel.chunks > 1 else None,
        context_parallel_size=cfg.parallel.context,
        distributed_timeout_minutes=cfg.parallel.timeout_minutes,  # type: ignore[arg-type]  # minutes of a timedelta
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


def say_once_for_each_layer() -> None:
    """What is logged of a layer is logged by one of the ranks that have it, as all of them decide the same."""
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if parallel_state.get_tensor_model_parallel_rank() or replica:
        logging.getLogger("megasparse.mlp").setLevel(logging.WARNING)


def _make_deterministic() -> None:
    """The same numbers from the same run on the same layout. Before anything is computed."""
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's attention; Megatron insists on it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products
    torch.use_deterministic_algorithms(True)
    # It would fill every buffer that `torch.empty` makes with NaN. The kernels write all that they read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def shut_down() -> None:
    """Undoes `initialize`."""
    parallel_state.destroy_model_parallel()
    if _joined:
        _joined.clear()
        dist.destroy_process_group()
