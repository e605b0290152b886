"""When to stop early: signals, the time limit, or a stop file. All ranks stop after the same step.

A run stops early when any rank received SIGTERM, SIGUSR1 (SLURM's `--signal=USR1@120`, preemption), SIGHUP (its
terminal was closed, unless it was started by nohup) or SIGINT (Ctrl-C; a second one ends it at once), when the time
limit of the configuration or of the SLURM job is near, when a file called `stop` appears in the run directory
(`touch runs/<name>/stop`: for launchers which do not pass signals on, torchrun among them), or when the file does that
the environment names in MEGASPARSE_STOP_FILE (slurm/pretrain.sbatch: one of the job's own). Every rank reports what it
saw, in the same collective that reduces the loss; so all ranks take the same decision in the same step, save a
checkpoint and leave.

Exit codes of `megasparse pretrain` (torchrun replaces them by 1; the file `exit.json` in the run directory says the
first three under every launcher, and is not there after an error or a kill):

| code | meaning | what a launcher should do |
|---|---|---|
| 0 | all steps are done | nothing |
| 75 (`EX_TEMPFAIL`) | stopped early, checkpoint saved | requeue: the same command continues the run |
| 65 (`EX_DATAERR`) | loss or gradient was not finite for too many steps in a row | look at the run before restarting |
| other | an error | read the log |
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType, TracebackType

from megasparse.small_files import write_json

log = logging.getLogger("megasparse")

EXIT_DONE = 0
EXIT_REQUEUE = 75
EXIT_NOT_FINITE = 65

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

INTERRUPT_SECONDS = 1.0
"""A terminal and a launcher may both pass on one Ctrl-C: within this time they count once."""

STOP_FILE = "stop"
EXIT_FILE = "exit.json"


class StopReason(IntEnum):
    """Why to stop; when ranks differ the largest wins."""

    NONE = 0
    TIME_LIMIT = 1
    STOP_FILE = 2
    SIGUSR1 = 3
    SIGHUP = 4
    SIGTERM = 5
    SIGINT = 6


class StopWatcher:
    """Remembers the signals this process gets and knows the time limit. A context manager: restores the handlers.

    Handlers only set a flag, so a signal never interrupts a step, and a process forked to write a checkpoint
    survives a SIGTERM which is sent to the whole process group.

    Args:
        time_limit_minutes: stop when this much time has passed since the process started, or None.
        run_directory: where the stop file is looked for; only on the rank that passes it, which alone watches the time
            of a SLURM job too.
        margin_seconds: how long before the end of a SLURM job (`SLURM_JOB_END_TIME`) to stop.
    """

    def __init__(
        self,
        time_limit_minutes: float | None = None,
        run_directory: Path | None = None,
        margin_seconds: float = 120.0,
    ) -> None:
        self._reason = StopReason.NONE
        self._old: dict[int, object] = {}
        self._stop_file = run_directory / STOP_FILE if run_directory is not None else None
        self._launcher_file = os.environ.get("MEGASPARSE_STOP_FILE", "")
        self._interrupted = float("inf")
        """When the first Ctrl-C came, in seconds of the monotonic clock."""
        self._deadline = self._job_deadline = float("inf")
        self._job_is_over = False
        self._margin = margin_seconds
        if time_limit_minutes is not None:
            self._deadline = process_start_time() + 60.0 * time_limit_minutes
        job_end = os.environ.get("SLURM_JOB_END_TIME", "")
        if job_end.isdigit() and run_directory is not None:
            self._job_deadline = int(job_end) - margin_seconds

    def __enter__(self) -> StopWatcher:
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._reason = max(self._reason, StopReason[signal.Signals(number).name])

    def catch_interrupts(self) -> None:
        """From now on Ctrl-C asks the run to stop as the other signals do; until now it ended the process.

        Where SIGINT is ignored (a shell's background job) it stays so.
        """
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._interrupted > INTERRUPT_SECONDS:
            raise KeyboardInterrupt
        if self._reason != StopReason.SIGINT and self._stop_file is not None:
            # Not by way of buffered streams: the signal may have come while one of them was at work.
            os.write(2, b"\nsaving a checkpoint after this step, then leaving; Ctrl-C again: leaving at once\n")
        self._interrupted = min(now, self._interrupted)
        self._handle(number, frame)

    def local_reason(self) -> StopReason:
        """What this rank alone knows; the ranks' maximum is what counts."""
        reason = self._reason
        if time.time() >= self._deadline or self._job_ends():
            reason = max(reason, StopReason.TIME_LIMIT)
        # Not Path.exists, which raises where the file system answers with an error for a moment (ESTALE, EIO).
        if self._stop_file is not None and (os.path.exists(self._stop_file) or os.path.exists(self._launcher_file)):
            reason = max(reason, StopReason.STOP_FILE)
        return reason

    def _job_ends(self) -> bool:
        if time.time() >= self._job_deadline and not self._job_is_over:
            end = slurm_job_end()  # its limit may have been raised since it started
            if end is None or end - self._margin <= time.time():
                self._job_is_over = True  # asked no more: SLURM may take its time to answer
            else:
                self._job_deadline = end - self._margin
        return self._job_is_over

    def clear_stop_file(self) -> None:
        """Removes the stop file, so that the next start does not stop at once. Says it where it cannot."""
        if self._stop_file is not None:
            try:
                self._stop_file.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be removed (%s): the next start will stop at once", self._stop_file, error)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals wait until the block ends. Child processes that start in it never get them.

    Megatron's checkpoint writer keeps a helper process; a SIGTERM or Ctrl-C to the whole job would end it, and with it
    the save that the signal asks for.
    """
    resource_tracker.ensure_running()  # starting it later, from in here, would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def slurm_job_end() -> float | None:
    """Unix time at which SLURM will end this job, as it says now; None where it does not say."""
    job, array = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:  # the id of an array's last task is also that of the whole array
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        return datetime.datetime.fromisoformat(done.stdout.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def process_start_time() -> float:
    """Unix time at which this process started: imports and initialisation count towards a time limit."""
    import psutil

    return float(psutil.Process().create_time())


def write_exit_file(run_directory: Path, code: int, reason: str, step: int) -> None:
    """Writes `exit.json`: {"code", "requeue", "reason", "step"}; replaces an older one in one move.

    Says it where it cannot: all else is saved, and other ranks go on.
    """
    record = {"code": code, "requeue": code == EXIT_REQUEUE, "reason": reason, "step": step}
    try:
        write_json(run_directory / EXIT_FILE, record)
    except OSError as error:
        log.warning("%s cannot be written (%s); the exit code alone says %d", run_directory / EXIT_FILE, error, code)


def clear_exit_file(run_directory: Path) -> None:
    """Removes that of an earlier start: should this one be killed, it must not speak for it."""
    (run_directory / EXIT_FILE).unlink(missing_ok=True)


def ignore_signals_in_worker(worker_id: int) -> None:
    """`worker_init_fn` of data loaders: a SIGTERM to the process group must not kill the workers.

    The main process still needs them until it has finished the step and saved; a worker ends when its loader closes
    or when its parent is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
