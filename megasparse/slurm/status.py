"""`megasparse status RUN`: what a run is doing, from SLURM and from the files in its directory."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megasparse.monitoring.record import Record, last_records
from megasparse.monitoring.sinks.console import duration
from megasparse.small_files import read_json
from megasparse.training.checkpoint_files import LATEST, checkpoint_name, read_latest, step_of
from megasparse.training.heartbeat import HANG_FILE
from megasparse.training.run_lock import lock_holder
from megasparse.training.signals import EXIT_DONE, EXIT_FILE

WINDOW = 50
"""Training records that the time a step takes is taken from."""

ENDED = (
    "done", "stopped", "ended", "not running", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED",
    "OUT_OF_MEMORY", "TIMEOUT",
)  # fmt: skip
"""States of a run that nobody continues by itself, ours and SLURM's: it has no ETA."""


class StatusError(ValueError):
    """There is no run to tell of."""


@dataclass(frozen=True)
class Status:
    """State of a run; None: not known. `eta_seconds` counts from now, at the pace of the last steps.

    `last_end` is why the newest attempt that has ended did, `hang` who keeps the run from going on (heartbeat.py),
    `skipped_steps` those whose gradients were not finite, `checkpoint` the newest complete one.
    """

    run: str
    job: str | None
    state: str
    reason: str | None
    nodes: str | None
    requeues: int
    last_end: str | None
    hang: str | None
    step: int | None
    steps: int | None
    loss: float | None
    skipped_steps: int | None
    tokens_per_second: float | None
    eta_seconds: float | None
    seconds_a_step: float | None
    seconds_since_step: float | None
    checkpoint: str | None
    seconds_since_checkpoint: float | None
    log: str | None

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))


def status_of(run: Path, now: float) -> Status:
    """Looks at a run directory and asks SLURM about its newest job.

    Args:
        now: Unix seconds.

    Raises:
        StatusError: the directory is not that of a run.
    """
    if not (run / "config.yaml").is_file() and not (run / "logs").is_dir():
        raise StatusError(f"{run}: not the directory of a run (no config.yaml, no logs)")
    process, free = _look_at_lock(run)
    trains = re.search(r"SLURM job (\d+)", process or "")
    logs = (_newest_logs(run, trains.group(1)) if trains else None) or _newest_logs(run)
    job = logs.name.rsplit("-", 1)[0] if logs else None
    ends = _read_ends(run / "requeues.jsonl")
    config = _read_config(run)
    metrics = Path(config.get("logging", {}).get("directory") or run) / "metrics.jsonl"
    records = last_records(metrics, "train", WINDOW)
    last = records[-1] if records else None
    steps = config.get("training", {}).get("steps")
    checkpoints = Path(config.get("checkpoint", {}).get("directory") or run / "checkpoints")
    checkpoint = read_latest(checkpoints)
    # A later start that was refused leaves no other word.
    complete = steps is not None and checkpoint == checkpoint_name(steps)
    end = _exit(run, last)
    state, reason, nodes = (
        _ask_slurm(job)
        or (("running", process, None) if process else None)
        or _from_files(ends)
        or _from_exit(end)
        or (("done", None, None) if free and complete else None)
        or ("not running" if free else "not known to SLURM", None, None)
    )
    pace = _seconds_a_step(records)
    # Records are written every so many steps; a run that ends, or saves, may be past the last.
    reached = [last.step if last else None, end.get("step"), step_of(checkpoint or "")]
    step = max((number for number in reached if number is not None), default=None)
    left = None if step is None or steps is None else max(0, steps - step)
    return Status(
        run=str(run),
        job=job,
        state=state,
        reason=reason,
        nodes=nodes,
        requeues=sum(1 for end in ends if end.get("requeued")),
        last_end=str(ends[-1]["reason"]) if ends else None,
        hang=_hang(run),
        step=step,
        steps=steps,
        loss=_number(last, "loss/lm"),
        skipped_steps=int(_number(last, "optim/skipped_steps") or 0) if last else None,
        tokens_per_second=_number(last, "throughput/tokens_per_second"),
        eta_seconds=0.0 if left == 0 else None if left is None or pace is None or state in ENDED else left * pace,
        seconds_a_step=pace,
        seconds_since_step=now - last.time if last else None,
        checkpoint=checkpoint,
        seconds_since_checkpoint=now - (checkpoints / LATEST).stat().st_mtime if checkpoint else None,
        log=str(logs / "job.log") if logs else None,
    )


def print_status(status: Status) -> None:
    """A few lines for people."""
    job = f"job {status.job}: {status.state}" if status.job else status.state
    print(f"{status.run}: {job}" + (f" ({status.reason})" if status.reason else ""))
    if status.hang:
        print(f"  HANG      {status.hang}")
    if status.nodes:
        print(f"  nodes     {status.nodes}")
    if status.job:
        print(f"  requeued  {status.requeues} times")
    if status.last_end and status.last_end != status.reason:
        print(f"  last end  {status.last_end}")
    if status.step is None:
        print("  no step yet")
    else:
        print(f"  step      {status.step:,} of {status.steps:,}" if status.steps else f"  step      {status.step:,}")
        print("  loss      " + ("not finite" if status.loss is None else f"{status.loss:.4f}"))
    if status.skipped_steps:
        print(f"  skipped   {status.skipped_steps:,} steps, whose gradients were not finite")
    if status.tokens_per_second is not None:
        print(f"  tokens/s  {status.tokens_per_second:,.0f}")
    if status.eta_seconds:
        print(f"  ETA       {duration(status.eta_seconds)}, at the pace of the last steps")
    if status.seconds_since_step is not None:
        pace = f"; a step takes {status.seconds_a_step:.3g} s" if status.seconds_a_step is not None else ""
        print(f"  last step {duration(status.seconds_since_step)} ago{pace}")
    if status.seconds_since_checkpoint is not None:
        print(f"  saved     {status.checkpoint}, {duration(status.seconds_since_checkpoint)} ago")
    if status.log:
        print(f"  log       {status.log}")


def _newest_logs(run: Path, job: str = "*") -> Path | None:
    """Of the newest attempt (of a job): JOB-ATTEMPT."""
    directories = [path for path in (run / "logs").glob(f"{job}-*") if path.is_dir()]
    return max(directories, key=lambda path: path.stat().st_mtime, default=None)


def _look_at_lock(run: Path) -> tuple[str | None, bool]:
    """The process that trains there; whether there is none for sure."""
    try:
        holder = lock_holder(run)
    except OSError:
        return None, False
    return (holder.split(" (run directory")[0] if holder else None), holder is None


def _hang(run: Path) -> str | None:
    """What the ranks wrote when nothing moved any more; gone when something does, or at the next start."""
    return read_json(run / HANG_FILE).get("reason")


def _ask_slurm(job: str | None) -> tuple[str, str | None, str | None] | None:
    """State, reason and nodes of a job that SLURM still knows."""
    if job is None:
        return None
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%A|%T|%r|%N"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        number, state, reason, nodes = line.strip().split("|", 3)
        if number == job:  # the id of an array's last task is also that of the whole array
            return state, None if reason == "None" else reason, nodes or None
    return None


def _exit(run: Path, last: Record | None) -> dict[str, Any]:
    """What a run wrote when it ended, unless it has made steps since."""
    file = run / EXIT_FILE
    return {} if not file.is_file() or (last is not None and file.stat().st_mtime < last.time) else read_json(file)


def _from_exit(end: dict[str, Any]) -> tuple[str, str | None, None] | None:
    """The same as a state, for a run without SLURM."""
    if not end:
        return None
    if end.get("code") == EXIT_DONE:
        return "done", None, None
    reason = str(end.get("reason")).partition("\n")[0]
    if end.get("requeue"):
        return "stopped", f"{reason} after step {end.get('step')}", None
    return "ended", reason, None


def _from_files(ends: list[dict[str, object]]) -> tuple[str, str | None, str | None] | None:
    """What the batch script wrote last, where SLURM has forgotten the job."""
    if not ends:
        return None
    reason, nodes = str(ends[-1]["reason"]), str(ends[-1]["nodes"])
    if ends[-1]["requeued"]:
        return "requeued, not known to SLURM now", reason, nodes
    return ("done", None, nodes) if reason == "done" else ("ended", reason, nodes)


def _read_ends(path: Path) -> list[dict[str, object]]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    ends = []
    for line in lines:
        with contextlib.suppress(ValueError):  # half of one, which a full disk left; the next is on the same line
            ends.append(json.loads(line[max(0, line.rfind('{"time": ')) :]))
    return ends


def _read_config(run: Path) -> dict[str, dict[str, Any]]:
    """The resolved configuration that the run wrote."""
    try:
        return yaml.safe_load((run / "config.yaml").read_text()) or {}
    except FileNotFoundError:
        return {}


def _seconds_a_step(records: list[Record]) -> float | None:
    """Median over the last records; a pause between two attempts does not move it."""
    paces = [
        (later.time - earlier.time) / (later.step - earlier.step)
        for earlier, later in itertools.pairwise(records)
        if later.step > earlier.step
    ]
    return statistics.median(paces) if paces else None


def _number(record: Record | None, name: str) -> float | None:
    value = record.metrics.get(name) if record is not None else None
    return float(value) if isinstance(value, int | float) else None
