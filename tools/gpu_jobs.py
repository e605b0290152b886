"""Several commands on the GPUs of one machine: each on GPUs of its own, as many side by side as fit."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A command for `gpus` GPUs; its output goes to `folder`/console.log, its exit code to `folder`/exit_code."""

    name: str
    gpus: int
    command: Sequence[str]
    folder: Path
    after: "Job | None" = None
    """Starts only once that one ended well."""

    @property
    def done(self) -> bool:
        """Whether it ended well, now or in an earlier call: it is not repeated then."""
        path = self.folder / "exit_code"
        return path.exists() and path.read_text().strip() == "0"


def slug(name: str) -> str:
    """What a variant or layout of this name calls its folder: "TP 2 + SP" -> "tp-2-sp", "1.5e-5" -> "1.5e-5"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def run_jobs(jobs: Sequence[Job], gpus: int, ended: Callable[[Job], None] | None = None) -> list[Job]:
    """Runs the jobs, in order as far as the GPUs allow: a later job that fits may start before an earlier one.

    Args:
        jobs: with different folders.
        gpus: of this machine (those that CUDA_VISIBLE_DEVICES names, if it is set).
        ended: called after each job that ended well, and for those that were done before.

    Whatever ends the call early (an exception, Ctrl-C) ends the running jobs with SIGTERM and waits for them: they may
    have something to save.

    Returns:
        the jobs that failed, the end of whose output has been printed, and those that were to follow them.

    Raises:
        ValueError: where a job needs more GPUs than there are.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    free = visible.split(",")[:gpus] if visible else [str(index) for index in range(gpus)]
    for job in jobs:
        if job.gpus > len(free):
            of_these = f" (CUDA_VISIBLE_DEVICES={visible})" if len(free) < gpus else ""
            raise ValueError(f"{job.name} needs {job.gpus} GPUs, there are {len(free)}{of_these}")
    waiting, failed = [], []
    for job in jobs:
        if not job.done:
            waiting.append(job)
        elif ended:
            ended(job)
    running: list[tuple[Job, list[str], subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            for job in list(waiting):
                if job.after is not None and not job.after.done:
                    if job.after not in [*waiting, *(entry[0] for entry in running)]:
                        waiting.remove(job)
                        failed.append(job)
                elif job.gpus <= len(free):
                    mine, free = free[: job.gpus], free[job.gpus :]
                    running.append((job, mine, _start(job, mine)))
                    waiting.remove(job)
            for entry in [entry for entry in running if entry[2].poll() is not None]:
                running.remove(entry)
                job, mine, process = entry
                free = sorted([*free, *mine])
                (job.folder / "exit_code").write_text(f"{process.returncode}\n")
                if process.returncode == 0:
                    if ended:
                        ended(job)
                else:
                    failed.append(job)
                    tail = "\n".join((job.folder / "console.log").read_text(errors="replace").splitlines()[-30:])
                    print(f"{job.name}: exit code {process.returncode}; the end of its output:\n{tail}", flush=True)
            time.sleep(0.1)
    finally:
        for _, _, process in running:
            process.terminate()
        for _, _, process in running:
            process.wait()
    return failed


def _start(job: Job, gpus: list[str]) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder / "console.log"
    print(f"{job.name}: GPU {','.join(gpus)}: {' '.join(job.command)} > {log}", flush=True)
    # One thread a process unless the user says more, as torchrun does: jobs side by side would fight for the cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    with log.open("wb") as stream:
        return subprocess.Popen(job.command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
