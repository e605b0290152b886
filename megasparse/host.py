"""The name of this machine."""

from __future__ import annotations

import os
import socket


def host_name() -> str:
    """SLURM's name of this node, which is what its commands understand; else the host's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
