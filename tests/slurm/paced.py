"""`megasparse ARGUMENTS` that waits before step MEGASPARSE_TEST_HOLD of one attempt of a job (the first, 0).

Each rank writes its process id to RUN/holding.RANK and goes on when RUN/go, RUN/stop or what the launcher tells its
job to stop by is there, or after ten minutes.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from megasparse.cli import main

# The helper process of a checkpoint imports this file too: what takes long to import is imported where it is used.


def hold_before(step: int) -> None:
    """Puts the wait in front of `loop.prepare_step`."""
    from megasparse.training import loop

    go_on = loop.prepare_step

    def prepare(run: Any, next_step: int) -> float:
        if next_step == step:
            directory = run.cfg.run_directory
            rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
            own = directory / f"starting.{rank}"
            own.write_text(str(os.getpid()))
            own.rename(directory / f"holding.{rank}")
            awaited = (directory / "go", directory / "stop", os.environ.get("MEGASPARSE_STOP_FILE", ""))
            end = time.monotonic() + 600
            while time.monotonic() < end and not any(map(os.path.exists, awaited)):
                time.sleep(0.05)
        return go_on(run, next_step)

    loop.prepare_step = prepare


if __name__ == "__main__":
    step = int(os.environ.get("MEGASPARSE_TEST_HOLD", "0"))
    if step and os.environ.get("SLURM_RESTART_COUNT", "0") == os.environ.get("MEGASPARSE_TEST_HOLD_ATTEMPT", "0"):
        hold_before(step)
    main(sys.argv[1:])
