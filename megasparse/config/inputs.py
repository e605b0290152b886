"""Whether the files that a run reads are there."""

from __future__ import annotations

from pathlib import Path

from megasparse.config.errors import ConfigError, Problem
from megasparse.config.schema import Config


def check_files(cfg: Config) -> None:
    """What a run reads must be there. Raises ConfigError naming what is not."""
    problems = []
    if not cfg.data.prefixes:
        problems.append(
            Problem(
                "data.blend",
                "a run needs data, and neither data.blend nor data.train is given",
                "write one with `megasparse preprocess` and set data.blend to its --output",
            )
        )
    for prefix in cfg.data.prefixes:
        missing = [prefix + end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]
        if missing:
            problems.append(
                Problem(
                    "data",
                    f"no file {' and no file '.join(missing)} (working directory: {Path.cwd()})",
                    "write it with `megasparse preprocess`; prefixes are without .bin/.idx",
                    prefix,
                )
            )
    if cfg.data.tokenizer and not Path(cfg.data.tokenizer).exists():
        problems.append(
            Problem(
                "data.tokenizer",
                f"no such file (working directory: {Path.cwd()})",
                "give a tokenizer.json or a Hugging Face tokenizer directory",
                cfg.data.tokenizer,
            )
        )
    if cfg.checkpoint.load and not Path(cfg.checkpoint.load).exists():
        problems.append(
            Problem(
                "checkpoint.load",
                f"no such path (working directory: {Path.cwd()})",
                "give a checkpoint or run directory",
                cfg.checkpoint.load,
            )
        )
    if problems:
        raise ConfigError(problems)
