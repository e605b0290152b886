"""An output folder that gets its name when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megasparse.hf.errors import ConvertError

_MARKER = ".conversion.json"
_RESERVE = 64 * 2**20
"""Bytes left free on the disk."""


@contextmanager
def output_folder(
    target: Path,
    needed: int,
    overwrite: bool,
    fingerprint: dict[str, Any] | None = None,
    inputs: tuple[Path, ...] = (),
    reusable: Callable[[Path], int] = lambda folder: 0,
) -> Iterator[Path]:
    """A hidden folder beside `target`, which becomes `target` when the block ends well.

    Where the block fails the folder is removed. Where it is interrupted (Ctrl-C, SIGTERM, a kill) and there is a
    `fingerprint`, it stays, and a later call with the same fingerprint gets it back as it is.

    Args:
        needed: bytes that will be written.
        overwrite: replace an existing `target`, once the new one is complete.
        fingerprint: what the output depends on.
        inputs: paths that are read and must not be replaced.
        reusable: bytes in a folder found again that need not be written again.

    Raises:
        ConvertError: the target exists, is among the inputs, cannot be written, or does not fit on the disk.
    """
    target = Path(os.path.abspath(target))
    for path in inputs:
        source = path.resolve()
        if source == target.resolve() or target.resolve() in source.parents:
            raise ConvertError(f"{target}: is the input or a folder around it; choose another output")
    if target.exists() and not overwrite:
        raise ConvertError(f"{target}: exists already; choose another output or give --overwrite")
    if target.exists() and not target.is_dir():
        raise ConvertError(f"{target}: is a file, not a folder; choose another output")
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists() and (fingerprint is None or _read(partial / _MARKER) != fingerprint):
            shutil.rmtree(partial)
        kept = reusable(partial) if partial.exists() else 0
        free = shutil.disk_usage(partial.parent).free
        if needed - kept + _RESERVE > free:
            raise ConvertError(
                f"{target}: needs {_gib(needed - kept)} and {partial.parent} has {_gib(free)} free; make room or "
                "choose "
                "an output on another disk"
            )
        partial.mkdir(exist_ok=True)
        if fingerprint is not None:
            (partial / _MARKER).write_text(json.dumps(fingerprint))
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written ({error.strerror or error}); choose another output") from None
    try:
        yield partial
        (partial / _MARKER).unlink(missing_ok=True)
        _put_in_place(partial, target)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # Writing to an open file names no file: disk full, quota, I/O error.
            raise ConvertError(
                f"{target}: writing failed ({error.strerror}); make room or choose another output"
            ) from None
        raise
    except BaseException:
        if fingerprint is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _put_in_place(partial: Path, target: Path) -> None:
    for path in (*partial.rglob("*"), partial):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
