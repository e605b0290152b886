import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megasparse.monitoring.record import Record, last_records, read_records
from megasparse.monitoring.sinks.jsonl import FILE_NAME, JsonlSink, truncate_to_step


def write(directory: Path, steps: range, resumed: int = 0) -> None:
    sink = JsonlSink(directory, resumed)
    for step in steps:
        sink.write(Record(step, 1000.0 + step, "train", {"loss/lm": 1.0 / step, "sparsity/layer_0/path": "dense"}))
    sink.close()


def test_each_record_is_one_object_a_line(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": s, "time": 1000.0 + s, "split": "train", "loss/lm": 1.0 / s, "sparsity/layer_0/path": "dense"}
        for s in (1, 2, 3)
    ]


def test_a_record_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(Record(1, 0.0, "train", {"loss/lm": 2.0}))
    assert [record.step for record in read_records(tmp_path / FILE_NAME)] == [1]
    sink.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(Record(1, 0.0, "train", {"loss/lm": value}))
    sink.close()
    assert json.loads((tmp_path / FILE_NAME).read_text())["loss/lm"] is None


def test_resuming_cuts_back_to_the_resumed_step(tmp_path: Path) -> None:
    write(tmp_path, range(1, 11))
    write(tmp_path, range(7, 9), resumed=6)
    assert [record.step for record in read_records(tmp_path / FILE_NAME)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_nothing_is_rewritten_where_nothing_has_to_go(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    before = os.stat(tmp_path / FILE_NAME)
    assert truncate_to_step(tmp_path / FILE_NAME, 4) == 0
    after = os.stat(tmp_path / FILE_NAME)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_cut_short_is_dropped_on_resume(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(1, 6))
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    # `cut` 1 takes the newline alone: the record is whole and stays.
    whole = [1, 2, 3, 4, 5] if cut == 1 else [1, 2, 3, 4]
    assert [record.step for record in read_records(path)] == whole
    write(tmp_path, range(6, 7), resumed=5)
    assert [record.step for record in read_records(path)] == [*whole, 6]
    assert path.read_bytes().count(b"\n") == len(whole) + 1


_WRITER = """
import sys
from pathlib import Path
from megasparse.monitoring.record import Record
from megasparse.monitoring.sinks.jsonl import JsonlSink
sink = JsonlSink(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    sink.write(Record(step, 0.0, "train", {f"metric/{i}": i / 7 for i in range(2000)}))
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)])
    path = tmp_path / FILE_NAME
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 2_000_000):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [record.step for record in read_records(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= path.read_bytes().count(b"\n") > 10
    write(tmp_path, range(11, 13), resumed=10)
    assert [record.step for record in read_records(path)] == list(range(1, 13))


def test_a_disk_that_takes_half_a_record_costs_that_record_alone(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    record = [Record(step, 0.0, "train", {"loss/lm": 1.0, "path": "dense" * 20}) for step in range(3)]
    sink.write(record[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sink.path.stat().st_size + 50, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            sink.write(record[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sink.write(record[2])
    sink.close()
    assert list(read_records(sink.path)) == [record[0], record[2]]


def test_last_records_are_those_at_the_end(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step in range(1, 401):  # longer than one piece that is read
        sink.write(Record(step, 0.0, "train", {f"sparsity/layer_{layer}/l0": 0.125 for layer in range(300)}))
        if step % 10 == 0:
            sink.write(Record(step, 0.0, "valid", {"eval/loss": 1.0}))
    sink.close()
    path = tmp_path / FILE_NAME
    with path.open("a") as file:
        file.write('{"step":401,"ti')
    train = [record for record in read_records(path) if record.split == "train"]
    for count in (1, 50, 350, 1000):
        assert last_records(path, "train", count) == train[-count:]
    assert [record.step for record in last_records(path, "valid", 2)] == [390, 400]
    assert last_records(tmp_path / "none.jsonl", "train", 5) == []
