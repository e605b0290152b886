"""Brings a run to where it left off, and refuses to go on with other data or too few samples."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megasparse.config import Config, ConfigError, Problem
from megasparse.ranks import on_every_rank, on_first_rank, this_rank
from megasparse.start_checks import check_resume
from megasparse.training.callbacks import TrainState
from megasparse.training.checkpoint import Checkpointer
from megasparse.training.data import DataChangedError, check_probes
from megasparse.training.datasets import Datasets

log = logging.getLogger("megasparse")


def restore(cfg: Config, checkpointer: Checkpointer, state: TrainState, datasets: Datasets) -> None:
    """Loads the newest checkpoint of the run, or what `checkpoint.load` names, or nothing, as configured.

    Raises:
        ConfigError: `checkpoint.resume` and `checkpoint.load` do not agree with what is found.
    """
    section = cfg.checkpoint
    on_first_rank(partial(check_resume, cfg))
    extra = checkpointer.resume(state)
    if extra is None and section.load is not None:
        path = checkpointer.locate(Path(section.load))
        if section.load_scope == "weights":
            checkpointer.load_weights(path, state.model, state.optimizer)
        else:
            extra = checkpointer.load(path, state)
            state.wandb_run_id = None  # another run's
        if state.is_writer:
            log.info("checkpoint: %s loaded from %s", section.load_scope, path)
    if extra is not None:
        try:
            on_every_rank(partial(check_data, datasets.train, extra))  # each has read indices of its own node
        except DataChangedError as error:
            if not cfg.data.allow_change:
                raise
            if state.is_writer:
                log.warning("data.allow_change: going on although %s", error)
    if state.resumed_from is not None and state.is_writer:
        log.info("checkpoint: resumed from %s (step %d)", state.resumed_from, state.step)


def check_data(dataset: Any, extra: dict[str, Any]) -> None:
    """Compares a checkpoint's data with what this rank reads. Raises DataChangedError."""
    try:
        check_probes(dataset, [(int(position), text) for position, text in extra["data"]])
    except DataChangedError as error:
        if dist.get_rank() == 0:
            raise
        raise DataChangedError(f"{this_rank()}: {error}") from None  # told where ranks before it read the right data


def check_samples(cfg: Config, state: TrainState) -> None:
    """The samples of a run are laid out for training.steps of the global batch; both may have changed on the way.

    Raises:
        ConfigError: there are not enough for the steps that are left.
    """
    batch = cfg.training.global_batch_size
    if state.step < cfg.training.steps and state.consumed_samples > state.step * batch:
        rule = f"smaller than before: the run has read {state.consumed_samples} samples in {state.step} steps"
        unit = cfg.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
        least = math.ceil(state.consumed_samples / state.step / unit) * unit
        fix = f"set at least {least}, or start a new run from the weights with checkpoint.load"
        raise ConfigError([Problem("training.global_batch_size", rule, fix, batch)])
