import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from megasparse.monitoring.record import Record
from megasparse.monitoring.sinks.console import ConsoleSink, duration, si

ROOT = Path(__file__).resolve().parents[2]


def train(step: int) -> Record:
    metrics = {
        "loss/lm": 3.14159, "sparsity/layer_0/l0": 10.0, "sparsity/layer_1/l0": 20.0, "lr": 1e-3, "grad_norm": 0.5,
        "throughput/tokens_per_second": 12345.0, "perf/step_time_s": 0.5,
    }  # fmt: skip
    return Record(step, 0.0, "train", metrics)


def test_a_line_a_record_where_output_is_a_file() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(100, stream=stream)
    for step in range(1, 11):
        sink.advance(step)
    sink.write(train(10))
    sink.write(Record(10, 0.0, "valid", {"eval/loss": 2.0, "eval/ppl": 7.389}))
    sink.close()
    assert stream.getvalue().splitlines() == [
        "step 10/100  loss 3.1416  L0 15.0  12.3k tokens/s  lr 0.001  grad norm 0.5  left 0:00:45",
        "step 10/100  validation loss 2.0000  perplexity 7.389",
    ]


_TERMINAL = """
import logging, time
from tests.monitoring.test_console import train, ConsoleSink
logging.basicConfig(format="%(message)s")
sink = ConsoleSink(20)
for step in range(1, 21):
    sink.advance(step)
    if step % 5 == 0: sink.write(train(step))
    if step == 12: logging.getLogger("megasparse").warning("gradient not finite on rank 3")
    if step == 14: print("a plain print")
    time.sleep(0.02)
sink.close()
logging.getLogger("megasparse").warning("after the bar")
"""


def test_on_a_terminal_the_bar_stays_last_and_warnings_whole() -> None:
    main, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-c", _TERMINAL], stdin=child, stdout=child, stderr=child, cwd=ROOT, env=environment
    )
    os.close(child)
    output = b""
    try:
        while chunk := os.read(main, 65536):
            output += chunk
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    assert any("gradient not finite on rank 3" in line and "tokens/s" not in line for line in lines)
    assert "a plain print" in lines
    bar = [line for line in lines if line.startswith("step")][-1]
    assert "20/20" in bar
    assert "loss 3.1416  L0 15.0  12.3k tokens/s" in bar
    assert lines.index(bar) > next(i for i, line in enumerate(lines) if "rank 3" in line)
    assert "after the bar" in lines  # logging works on after the bar is gone
    assert "\x1b[?25h" in output.decode()  # the cursor is back


def test_numbers_for_people() -> None:
    assert [si(x) for x in (0.5, 12, 999, 999.9, 12345, 2.5e6)] == ["0.5", "12", "999", "1k", "12.3k", "2.5M"]
    assert [duration(x) for x in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
