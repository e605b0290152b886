"""Says which rank holds up the others, before the collective that waits for it fails.

Every rank writes RUN/heartbeat/rank_00003.json every few seconds, from a thread of its own: when that was, on which
host, and since when it has been at what. A rank that has not got on for LIMIT of the time that a collective may take
(`parallel.timeout_minutes`) reads the files of all and writes RUN/hang.json, for people and for the launcher:

    {"reason": "rank 3 on n2: no sign of life for 95 s, last at step 12, training; waited 480 s for it", "hosts": "n2"}

`hosts` is empty where many hosts or none are at fault. The collective fails soon after and ends its process; the
launcher ends the others. The file goes away where the run gets on after all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from megasparse.small_files import write_json

log = logging.getLogger("megasparse")

HANG_FILE = "hang.json"
FOLDER = "heartbeat"
LIMIT = 0.8
BEATS = 12
"""In LIMIT of the time of a collective; at most one in ten seconds."""
SILENT = 4.0
"""Beats that a rank which runs may miss: it gets no processor, or shared storage is slow."""
PHASES = (
    "before the first step", "reading data", "training", "reading data ahead", "update", "after the update",
    "validation", "checkpoint",
)  # fmt: skip
"""In the order in which a step passes through them."""


@dataclass(frozen=True)
class Beat:
    """Where a rank was at `time`, and since when. Unix seconds."""

    rank: int
    host: str
    time: float
    step: int
    phase: str
    since: float

    @property
    def place(self) -> tuple[int, int]:
        """Grows as a run goes on."""
        return self.step, PHASES.index(self.phase)


class Heartbeat:
    """A context manager: beats while it is open. `at` is all that the training loop calls.

    Args:
        directory: of the run, shared by all ranks.
        rank, world_size, host: of this process.
        timeout_seconds: that a collective may take.
    """

    def __init__(self, directory: Path, rank: int, world_size: int, host: str, timeout_seconds: float) -> None:
        self._directory, self._rank, self._world_size, self._host = directory, rank, world_size, host
        self._limit = LIMIT * timeout_seconds
        self._interval = min(10.0, self._limit / BEATS)
        self._at = (0, PHASES[0], time.time())
        self._reported = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_over, name="megasparse-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._world_size > 1:
            if self._rank == 0:
                with contextlib.suppress(OSError):  # the others do not wait to hear of it
                    (self._directory / HANG_FILE).unlink(missing_ok=True)
                # Of a rank that hangs before its first beat, what the attempt before left would blame another node.
                shutil.rmtree(self._directory / FOLDER, ignore_errors=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def at(self, step: int, phase: str) -> None:
        """This rank now begins `phase` (one of PHASES) of `step`."""
        self._at = (step, phase, time.time())

    def _beat_until_over(self) -> None:
        while not self._over.wait(self._interval):
            step, phase, since = self._at
            now = time.time()
            try:
                self._write(Beat(self._rank, self._host, now, step, phase, since))
                if now - since > self._limit and not self._reported:
                    self._report(now, now - since)
                elif now - since < self._limit and self._reported:
                    self._reported = False
                    (self._directory / HANG_FILE).unlink(missing_ok=True)
            except OSError as error:  # a full or slow disk: the run itself says so
                log.debug("heartbeat: %s", error)

    def _write(self, beat: Beat) -> None:
        path = self._file(beat.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(beat))

    def _file(self, rank: int) -> Path:
        return self._directory / FOLDER / f"rank_{rank:05d}.json"

    def _report(self, now: float, stuck: float) -> None:
        beats, absent = [], []
        for rank in range(self._world_size):
            try:
                beats.append(Beat(**json.loads(self._file(rank).read_text())))
            except (FileNotFoundError, ValueError):  # it never got here; its node died before what it wrote was stored
                absent.append(rank)
        reason, hosts = verdict(beats, now, SILENT * self._interval, absent)
        self._reported = True
        content = {"reason": f"{reason}; waited {stuck:.0f} s for it", "hosts": ",".join(hosts)}
        try:
            with (self._directory / HANG_FILE).open("x") as file:
                json.dump(content, file, indent=1)
        except FileExistsError:  # another rank was first
            return
        log.error("HANG: %s", reason)


def verdict(
    beats: Sequence[Beat], now: float, silent_after: float, absent: Sequence[int] = ()
) -> tuple[str, list[str]]:
    """What keeps a run from going on.

    Args:
        beats: the last one of every rank but those in `absent`, which left none that can be read.
        now: Unix seconds.
        silent_after: age of a beat, in seconds, beyond which its process does not run any more.

    Returns:
        a sentence that names ranks and hosts, and the hosts to do without: none where most of them are suspects.
    """
    silent = [beat for beat in beats if now - beat.time > silent_after]
    if absent and not silent:
        more = f" and {len(absent) - 6} more" if len(absent) > 6 else ""
        return f"rank {', '.join(map(str, absent[:6]))}{more}: no sign of life at all", []
    first = min(beat.place for beat in beats)
    behind = [beat for beat in beats if beat.place == first]
    if silent:
        guilty, found = silent, f"no sign of life for {now - max(beat.time for beat in silent):.0f} s"
    elif len(behind) < len(beats):
        guilty, found = behind, "behind all others"
    else:
        where = f"step {beats[0].step}, {beats[0].phase}"
        return f"all ranks stand at the same point ({where}): a collective does not come back", []
    names = [f"rank {beat.rank} on {beat.host}" for beat in guilty[:6]]
    if len(guilty) > 6:
        names.append(f"{len(guilty) - 6} more")
    last = f"step {guilty[0].step}, {guilty[0].phase}"
    hosts = sorted({beat.host for beat in guilty})
    few = 2 * len(hosts) <= len({beat.host for beat in beats})
    return f"{', '.join(names)}: {found}, last at {last}", hosts if few else []
