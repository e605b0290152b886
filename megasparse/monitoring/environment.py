"""What a run ran on and with: recorded beside its metrics, in W&B and in the report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megasparse.host import host_name, installed_version
from megasparse.small_files import read_json, write_json

FILE_NAME = "run.json"
_PACKAGES = ("megasparse", "torch", "megatron-core", "transformer-engine", "numpy", "transformers", "wandb")


def git_commit() -> str | None:
    """Commit of the source tree this package runs from, with `-dirty` where files differ; None outside git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:  # installed inside somebody else's repository
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_environment(world_size: int) -> dict[str, Any]:
    """Versions, hardware and job of this process. Holds no environment variables but SLURM's job id."""
    versions = {package: version for package in _PACKAGES if (version := installed_version(package))}
    result: dict[str, Any] = {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": host_name(),
        "cpu_count": os.cpu_count(),
        "world_size": world_size,
        "versions": versions,
        "command": " ".join(sys.argv),
    }
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
        result["gpus_per_host"] = torch.cuda.device_count()
        result["cuda"] = torch.version.cuda
    if job := os.environ.get("SLURM_JOB_ID"):
        result["slurm_job_id"] = job
    return result


def record_start(directory: Path, config: dict[str, Any], environment: dict[str, Any], step: int) -> None:
    """Write run.json: the newest configuration and environment, and one entry for every start of the run.

    A start from step 0 begins the list anew.
    """
    path = directory / FILE_NAME
    starts = read_json(path).get("starts", []) if step else []
    entry = {key: environment.get(key) for key in ("git_commit", "host", "world_size", "slurm_job_id")}
    starts.append({"step": step, "time": round(time.time(), 3), **{k: v for k, v in entry.items() if v is not None}})
    write_json(path, {"config": config, "environment": environment, "starts": starts})
