"""One line of metrics: what sinks take, what metrics.jsonl holds."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Value = float | int | str | None
"""None stands for a number that is not finite: JSON has no NaN."""


@dataclass(frozen=True)
class Record:
    """Metrics of one step. `step` counts finished iterations, from 1; `time` is Unix seconds."""

    step: int
    time: float
    split: str
    """"train" or "valid"."""
    metrics: Mapping[str, Value] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line without its newline. NaN and infinities become null, since they are not JSON."""
        fields: dict[str, Value] = {"step": self.step, "time": round(self.time, 3), "split": self.split}
        for name, value in self.metrics.items():
            fields[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Record:
        """Raises ValueError where the line is not a record (cut short by a kill, or foreign)."""
        fields = json.loads(line)
        if not isinstance(fields, dict) or not isinstance(fields.get("step"), int) or "split" not in fields:
            raise ValueError("not a metrics record: it needs an integer `step` and a `split`")
        step, time, split = fields.pop("step"), fields.pop("time", 0.0), fields.pop("split")
        # The same few hundred names in every record: one copy of each saves half of a long run's memory.
        return cls(step, time, split, {sys.intern(name): value for name, value in fields.items()})


def read_records(path: Path) -> Iterator[Record]:
    """Records of a metrics.jsonl, in order; a line cut short by a kill is left out. No file: nothing."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        yield from _parse(file)


def _parse(lines: Iterable[bytes]) -> Iterator[Record]:
    for line in lines:
        try:
            yield Record.from_json(line)
        except ValueError:
            continue


def last_records(path: Path, split: str, count: int) -> list[Record]:
    """The last `count` records of `split` in a metrics.jsonl, in order. Reads the file's end alone: that of a long run
    of many layers has hundreds of megabytes."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = end = file.seek(0, os.SEEK_END)
        while True:
            start = max(0, start - max(1 << 20, end - start))
            file.seek(start)
            if start:
                file.readline()  # the rest of a line
            found = [record for record in _parse(file.read(end - file.tell()).splitlines()) if record.split == split]
            if len(found) >= count or start == 0:
                return found[-count:]
