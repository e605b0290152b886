"""Helper processes that do not outlive the process they help."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""See prctl(2)."""


def end_with_parent() -> None:
    """From now on this process is killed when its parent ends, however that ends. Linux only; elsewhere nothing.

    A rank that gets SIGKILL cannot end its helpers itself. Where no cgroup holds them together (torchrun without
    SLURM, SLURM with proctrack/pgid) they would stay for ever.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGKILL)
