"""This machine: its name, and what is installed on it."""

from __future__ import annotations

import importlib.metadata
import os
import socket


def host_name() -> str:
    """SLURM's name of this node, which is what its commands understand; else the host's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def installed_version(package: str) -> str | None:
    """Of a Python package, by its name on PyPI; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
