"""`python -m tests.training.no_wait pretrain CONFIG ...`: a run whose steps fail at a call that waits for the GPU
before the last of the backward and of what is reduced with it is launched."""

from __future__ import annotations

import sys
from typing import Any

import torch

from megasparse.cli import main
from megasparse.training import loop, step

FIRST_STEP = 10
"""Earlier ones may wait: they compile, allocate and choose paths."""


def watch() -> None:
    train_step, start_reduction = loop.train_step, step.start_reduction
    steps = 0

    def watched_step(*arguments: Any, **options: Any) -> step.StepResult:
        nonlocal steps
        steps += 1
        torch.cuda.set_sync_debug_mode("error" if steps >= FIRST_STEP else "default")
        return train_step(*arguments, **options)

    def watched_reduction(*arguments: Any, **options: Any) -> torch.Tensor:
        row = start_reduction(*arguments, **options)
        torch.cuda.set_sync_debug_mode("default")
        return row

    loop.train_step = watched_step  # type: ignore[assignment]
    step.start_reduction = watched_reduction


if __name__ == "__main__":
    watch()
    sys.exit(main())
