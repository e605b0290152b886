"""The progress bar of `megasparse preprocess`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megasparse.data.preprocess import PreprocessResult
from megasparse.data.preprocess import Progress as ProgressFunction

_LABELS = {"tokenizer": "reading for the tokenizer", "tokens": "tokenising"}


@contextmanager
def show_progress() -> Iterator[ProgressFunction]:
    """A function to pass to `preprocess`, which draws a bar on stderr; silent where that is no terminal."""
    columns = (
        TextColumn("{task.description:<25}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def update(phase: str, read: int, total: int, result: PreprocessResult) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(_LABELS[phase], total=total, counts="")
            counts = f"{result.documents:,} documents, {result.tokens:,} tokens" if result.documents else ""
            bar.update(tasks[phase], completed=read, counts=counts)

        yield update
