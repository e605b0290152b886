"""What a run needs of the machine that it starts on: a start ends at the first that is missing, a dry run names all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megasparse.config import Config, check_directories, check_files, check_space
from megasparse.plan import checkpoint_bytes


def start_checks(cfg: Config) -> list[Callable[[], None]]:
    """In order; each raises ConfigError or DataError where something is missing."""
    return [
        partial(check_files, cfg),
        partial(check_directories, cfg),
        partial(check_space, cfg, checkpoint_bytes(cfg)),
    ]
