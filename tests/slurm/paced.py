"""`megasparse ARGUMENTS` that waits before step MEGASPARSE_TEST_HOLD of a job's first attempt.

Each rank writes its process id to RUN/holding.RANK and goes on when RUN/go or RUN/stop is there, or after two minutes.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from megasparse.cli import main
from megasparse.training import loop


def hold_before(step: int) -> None:
    """Puts the wait in front of `loop.prepare_step`."""
    go_on = loop.prepare_step

    def prepare(run: Any, next_step: int) -> float:
        if next_step == step:
            directory = run.cfg.run_directory
            rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
            own = directory / f"starting.{rank}"
            own.write_text(str(os.getpid()))
            own.rename(directory / f"holding.{rank}")
            end = time.monotonic() + 120
            while time.monotonic() < end and not any((directory / name).exists() for name in ("go", "stop")):
                time.sleep(0.05)
        return go_on(run, next_step)

    loop.prepare_step = prepare


if __name__ == "__main__":
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and os.environ.get("MEGASPARSE_TEST_HOLD", "0") != "0":
        hold_before(int(os.environ["MEGASPARSE_TEST_HOLD"]))
    main(sys.argv[1:])
