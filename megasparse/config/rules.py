"""Rules that involve more than one key. All of them run, so that all problems are reported together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megasparse.config import data_rules, model_rules, training_rules
from megasparse.config.errors import ConfigError, Problem
from megasparse.config.schema import Config

Rule = Callable[[Config], Iterator[Problem]]

RULES: tuple[Rule, ...] = (*model_rules.RULES, *training_rules.RULES, *data_rules.RULES)


def _world(cfg: Config, world_size: int) -> Iterator[Problem]:
    try:
        micro_batches = cfg.num_microbatches(world_size)
    except ConfigError as error:
        yield from error.problems
        return
    parallel = cfg.parallel
    if parallel.chunks > 1 and micro_batches % parallel.pipeline:
        yield Problem(
            "training.global_batch_size",
            f"gives {micro_batches} micro-batches per step; the interleaved "
            f"schedule needs a multiple of parallel.pipeline = {parallel.pipeline}",
            "change global_batch_size or micro_batch_size, or leave virtual_pipeline out",
            cfg.training.global_batch_size,
        )


def find_problems(cfg: Config, world_size: int | None = None) -> list[Problem]:
    """All broken rules; with `world_size` (ranks of the job) those of the layout too."""
    problems = [problem for rule in RULES for problem in rule(cfg)]
    if world_size is not None:
        problems += _world(cfg, world_size)
    return problems
