"""One run at a time in a run directory and in a checkpoint directory.

A second start beside the first would remove the checkpoint that it is writing, and its own would replace the others.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from megasparse.host import host_name

log = logging.getLogger("megasparse")

FILE = "lock"
PATIENCE = 180.0
"""Seconds to wait for another run to end: shared file systems take a minute or two to free the locks of a dead node."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLockedError(RuntimeError):
    """Another process trains in this directory; the message names it."""


@contextmanager
def run_lock(run_directory: Path, *others: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Rank 0 holds the locks while a run trains; the system frees them when the process ends, in whatever way.
    Collective.

    Where the file system knows no locks, nothing is locked.

    Args:
        run_directory: made where it is missing, as the others are.
        others: directories which the run must have for itself too.
        patience: seconds to wait for another run to end.

    Raises:
        RunLockedError, StorageError: on all ranks.
    """
    # It imports Megatron, which `lock_holder` does not need.
    from megasparse.ranks import on_first_rank

    with ExitStack() as held:
        run, *rest = (directory.resolve() for directory in (run_directory, *others))
        for directory in dict.fromkeys((run, *rest)):  # under two names it would wait for itself
            on_first_rank(partial(_lock, directory / FILE, run, patience, held))
        yield


def lock_holder(directory: Path) -> str | None:
    """The process that trains in a directory, as the lock's file calls it; None: there is none.

    Raises:
        OSError: that cannot be told: no such file, one of another user, no locks on this file system.
    """
    with (directory / FILE).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a run that starts just now tries again in a second
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None


def _lock(path: Path, run_directory: Path, patience: float, held: ExitStack) -> None:
    """Takes the lock and says in the file which run has it. `held` frees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = held.enter_context(path.open("a+"))
    begun, waiting = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Closing the file would leave the lock to child processes that still have it open.
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)
            break
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            if time.monotonic() - begun >= patience:
                choose = "run.name" if path.parent == run_directory else "checkpoint.directory"
                raise RunLockedError(
                    f"{path.parent}: {owner} trains there; wait for it, end it (a file `stop` in its run directory "
                    f"lets it save first), or choose another {choose}"
                ) from None
            if not waiting:
                log.info("%s: waiting up to %.0f s for %s to end", path.parent, patience, owner)
                waiting = True
            time.sleep(min(1.0, patience))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            break
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    process = f"process {os.getpid()} on {host_name()}" + (f", SLURM job {job}" if job else "")
    file.write(f"{process} (run directory {run_directory})\n")
    file.flush()
