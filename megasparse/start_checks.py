"""What a run needs of the machine that it starts on: a start ends at the first that is missing, a dry run names all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megasparse.config import Config, ConfigError, Problem, check_directories, check_files, check_space
from megasparse.plan import checkpoint_bytes
from megasparse.training.checkpoint_files import leftover_bytes, list_checkpoints, may_hold_checkpoint


def start_checks(cfg: Config) -> list[Callable[[], None]]:
    """In order; each raises ConfigError or DataError where something is missing."""
    return [
        partial(check_files, cfg),
        partial(check_directories, cfg),
        lambda: check_space(cfg, checkpoint_bytes(cfg), leftover_bytes(cfg.checkpoint_directory)),
        partial(check_resume, cfg),
    ]


def check_resume(cfg: Config) -> None:
    """Whether `checkpoint.resume` and `checkpoint.load` agree with what is there; looks into no checkpoint.

    Raises ConfigError.
    """
    section, root = cfg.checkpoint, cfg.checkpoint_directory
    problem = None
    try:
        found = list_checkpoints(root)
        loads = found or not section.load or may_hold_checkpoint(Path(section.load))
    except PermissionError as error:
        rule = f"{error.filename} cannot be read: {error.strerror}"
        raise ConfigError([Problem("checkpoint", rule, "make it readable")], host_specific=True) from None
    if section.resume == "never" and found:
        rule = f"never, but {root} holds checkpoints (the newest of step {found[0][0]})"
        fix = "choose another run.name or checkpoint.directory, or resume: auto"
        problem = Problem("checkpoint.resume", rule, fix)
    elif section.resume == "must" and not found:
        rule = f"must, but there is no checkpoint in {root}"
        problem = Problem("checkpoint.resume", rule, "start with resume: auto")
    elif not loads:
        fix = "give a checkpoint, its folder, or a run directory"
        problem = Problem("checkpoint.load", "there is no checkpoint there", fix, section.load)
    if problem is not None:
        raise ConfigError([problem], host_specific=True)
