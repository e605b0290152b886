"""How many micro-batches a pipeline stage holds between their forward and their backward."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config import Config


@dataclass(frozen=True)
class InFlight:
    """Micro-batches between their forward and their backward on one stage, at most."""

    at_once: int
    """In all chunks together: a micro-batch counts in each chunk that holds its activations."""
    of_chunk: tuple[int, ...]
    """In each chunk, whatever the others hold then."""


def in_flight(cfg: Config, stage: int, micro_batches: int) -> InFlight:
    """Goes through the stage's schedule: 1F1B, or interleaved (Megatron-Core's pipeline_parallel/schedules.py)."""
    pipeline, chunks = cfg.parallel.pipeline, cfg.parallel.chunks
    before_first_backward = pipeline - stage - 1
    if chunks > 1:  # chunk by chunk, for groups of as many micro-batches as there are stages
        before_first_backward = 2 * before_first_backward + (chunks - 1) * pipeline
    group = pipeline if chunks > 1 else 1
    held, most, at_once = [0] * chunks, [0] * chunks, 0
    for turn in range(min(micro_batches * chunks, before_first_backward + 2 * chunks * group)):
        held[turn // group % chunks] += 1
        most = [max(pair) for pair in zip(most, held, strict=True)]
        at_once = max(at_once, sum(held))
        if turn >= before_first_backward:
            held[chunks - 1 - (turn - before_first_backward) // group % chunks] -= 1
    return InFlight(at_once, tuple(most))
