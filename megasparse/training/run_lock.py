"""One run directory, one run: a second start beside the first would remove the checkpoint that it is writing."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch.distributed as dist

from megasparse.host import host_name

log = logging.getLogger("megasparse")

FILE = "lock"
PATIENCE = 180.0
"""Seconds to wait for another run to end: shared file systems take a minute or two to free the locks of a dead node."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLockedError(RuntimeError):
    """Another process trains in this run directory; the message names it."""


class RunLock:
    """Held by rank 0 while a run trains. The system frees it when the process ends, in whatever way.

    Where the file system knows no locks, nothing is locked.
    """

    def __init__(self, run_directory: Path, patience: float = PATIENCE) -> None:
        self._path = run_directory / FILE
        self._patience = patience
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        """Collective.

        Raises:
            RunLockedError: on all ranks.
        """
        problem = [self._lock() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise RunLockedError(problem[0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing would leave it to child processes that still have it open
            self._file.close()
            self._file = None

    def _lock(self) -> str | None:
        """What is in the way, or None."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+")
        begun, waiting = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                if time.monotonic() - begun >= self._patience:
                    file.close()
                    return (
                        f"{self._path.parent}: {owner} trains there; wait for it, end it (`touch "
                        f"{self._path.parent}/stop` lets it save first), or choose another run.name"
                    )
                if not waiting:
                    log.info("%s: waiting up to %.0f s for %s to end", self._path.parent, self._patience, owner)
                    waiting = True
                time.sleep(min(1.0, self._patience))
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break
        job = os.environ.get("SLURM_JOB_ID")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {host_name()}" + (f", SLURM job {job}" if job else "") + "\n")
        file.flush()
        self._file = file
        return None
