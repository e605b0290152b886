"""What the person at the terminal sees: a progress bar on the last line, or plain lines where output is a file."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megasparse.monitoring.record import Record, Value


def si(value: float) -> str:
    """Three figures and a metric prefix: 12345 -> "12.3k"."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{prefix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 -> "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def mean_l0(metrics: Mapping[str, Value]) -> float | None:
    """Mean over layers of `sparsity/layer_{i}/l0`; None where the record has none."""
    values = [
        value
        for name, value in metrics.items()
        if name.startswith("sparsity/layer_") and name.endswith("/l0") and isinstance(value, float)
    ]
    return sum(values) / len(values) if values else None


def _summary(metrics: Mapping[str, Value]) -> list[str]:
    """The few numbers that fit on a line; what the record lacks is left out."""
    parts = []
    loss, speed, l0 = metrics.get("loss/lm"), metrics.get("throughput/tokens_per_second"), mean_l0(metrics)
    if isinstance(loss, float):
        parts.append(f"loss {loss:.4f}")
    if l0 is not None:
        parts.append(f"L0 {l0:.1f}")
    if isinstance(speed, float):
        parts.append(f"{si(speed)} tokens/s")
    return parts


class ConsoleSink:
    """Progress of the run, for the writing rank.

    On a terminal the bar stays on the last line and everything else printed or logged goes above it. Elsewhere every
    record is one line, so that log files stay readable.
    """

    def __init__(self, total_steps: int, step: int = 0, stream: TextIO | None = None) -> None:
        """`step`: iterations already done. `stream`: where to print; None: standard output."""
        self._console = Console(file=stream or sys.stdout)
        self._total = total_steps
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._handlers: list[tuple[logging.Handler, logging.Handler]] = []
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[summary]}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self._console,
                expand=True,
                speed_estimate_period=120.0,
            )
            self._task = self._progress.add_task("train", total=total_steps, completed=step, summary="")
            self._progress.start()
            atexit.register(self.close)  # a run that ends by an exception must leave a usable terminal
            self._take_over_logging()

    def _take_over_logging(self) -> None:
        """Log handlers that hold the terminal itself would write through the bar: replace them while it lives."""
        root = logging.getLogger()
        for handler in list(root.handlers):
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stderr__, sys.__stdout__):
                ours = RichHandler(console=self._console, show_path=False, level=handler.level)
                root.removeHandler(handler)
                root.addHandler(ours)
                self._handlers.append((handler, ours))

    def advance(self, step: int) -> None:
        """Move the bar to `step` finished iterations; called every step, prints nothing elsewhere."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, record: Record) -> None:
        if record.split == "valid":
            loss, perplexity = record.metrics.get("eval/loss"), record.metrics.get("eval/ppl")
            if isinstance(loss, float) and isinstance(perplexity, float):
                text = f"validation loss {loss:.4f}  perplexity {perplexity:.3f}"
                self._print(f"step {record.step}/{self._total}  {text}")
            return
        parts = _summary(record.metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, summary="  ".join(parts))
            return
        for name, label in (("lr", "lr"), ("grad_norm", "grad norm")):
            value = record.metrics.get(name)
            if isinstance(value, float):
                parts.append(f"{label} {value:.3g}")
        step_time = record.metrics.get("perf/step_time_s")
        if isinstance(step_time, float):
            parts.append(f"left {duration(step_time * (self._total - record.step))}")
        self._print(f"step {record.step}/{self._total}  " + "  ".join(parts))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self, failed: bool = False) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            atexit.unregister(self.close)
        root = logging.getLogger()
        for original, ours in self._handlers:
            root.removeHandler(ours)
            root.addHandler(original)
        self._handlers.clear()
