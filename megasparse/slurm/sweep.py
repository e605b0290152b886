"""Prints the overrides that keep one run of a sweep apart from the others, a line each, for slurm/sweep.sbatch.

`python -m megasparse.slurm.sweep CONFIG ENDING [a.b=c ...]`: directories and a W&B name that the configuration gives
itself get ENDING appended; those that follow from run.name need nothing. Exit code 2 and the message where the
configuration is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megasparse.config import Config, ConfigError, load_config


def separating_overrides(cfg: Config, ending: str) -> list[str]:
    """Overrides (`a.b=c`) such that two endings write to no common place."""
    given = {
        "run.directory": cfg.run.directory,
        "checkpoint.directory": cfg.checkpoint.directory,
        "logging.directory": cfg.logging.directory,
        "logging.wandb.name": cfg.logging.wandb.name,
    }
    return [f"{key}={value.rstrip('/')}{ending}" for key, value in given.items() if value is not None]


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    config, ending, *overrides = arguments
    try:
        cfg = load_config(config, overrides)
    except ConfigError as error:
        print(f"megasparse: {error}", file=sys.stderr)
        return 2
    for override in separating_overrides(cfg, ending):
        print(override)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
