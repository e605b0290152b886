"""metrics.jsonl: one JSON object a line, the source of truth of a run's metrics.

A resumed run continues the same file, cut back to the step it resumes from, so that every step stands in it once
whatever was killed and rolled back on the way.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from megasparse.monitoring.record import Record

FILE_NAME = "metrics.jsonl"


def truncate_to_step(path: Path, step: int) -> int:
    """Cut `path` back to the records of steps <= `step`. Returns how many later records were removed.

    Lines that a kill left incomplete go too. The new content replaces the old atomically; where nothing has to go
    the file is not touched.
    """
    if not path.is_file():
        return 0
    kept, removed, damaged = [], 0, 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = Record.from_json(line)
            except ValueError:
                damaged += 1
                continue
            if record.step > step:
                removed += 1
            elif line.endswith(b"\n"):
                kept.append(line)
            else:  # whole, but killed before its newline
                damaged += 1
                kept.append(line + b"\n")
    if removed or damaged:
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return removed


class JsonlSink:
    """Appends records to `directory`/metrics.jsonl, each as one `write` of a whole line: a kill costs one at most."""

    def __init__(self, directory: Path, resumed_step: int = 0) -> None:
        """Cuts an existing file back to `resumed_step` (0: a new run, an older file's content goes)."""
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        truncate_to_step(self.path, resumed_step)
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Raises OSError where the file system does not take the record; the file is as before then."""
        line = record.to_json().encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):  # the disk is full: the next record must not join what there is of this one
            handle = self._file.fileno()
            os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self, failed: bool = False) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
