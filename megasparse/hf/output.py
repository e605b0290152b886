"""An output folder that gets its name when it is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.hf.errors import ConvertError
from megasparse.small_files import read_json
from megasparse.training.checkpoint_files import flush

_MARKER = ".conversion.json"
_RESERVE = 64 * 2**20
"""Bytes left free on the disk."""

Foreign = Callable[[Path], str | None]
"""Of a folder that is not empty: the name of an entry that an earlier call did not write, or None."""


def any_entry(folder: Path) -> str | None:
    """The `Foreign` of a command whose results cannot be told from other folders."""
    return min((path.name for path in folder.iterdir()), default=None)


@dataclass(frozen=True)
class Output:
    """The folder to write into. `note`: what was found there of an earlier call, or None."""

    path: Path
    note: str | None = None


@contextmanager
def output_folder(
    target: Path,
    needed: int,
    overwrite: bool,
    fingerprint: dict[str, Any] | None = None,
    inputs: tuple[Path, ...] = (),
    reusable: Callable[[Path], int] = lambda folder: 0,
    foreign: Foreign = any_entry,
) -> Iterator[Output]:
    """A hidden folder beside `target`, which becomes `target` when the block ends well.

    Where the block fails the folder is removed. Where it is interrupted (Ctrl-C, SIGTERM) and there is a
    `fingerprint`, it stays, as it always does after a kill; a later call with the same fingerprint gets it back as it
    is, any other call replaces it.

    Args:
        needed: bytes that will be written.
        overwrite: replace a `target` that is empty or an earlier result, once the new one is complete.
        fingerprint: what the output depends on.
        inputs: paths that are read and must not be replaced.
        reusable: bytes in a folder found again that need not be written again.
        foreign: what keeps an existing `target` from being an earlier result.

    Raises:
        ConvertError: the target exists, holds something else, is among the inputs, is being written by another
            process, cannot be written, or does not fit on the disk.
    """
    target = Path(os.path.realpath(target))  # a link stays; what it points to is written, on the disk that it is on
    partial, old = (target.with_name(f".{target.name}.{end}") for end in ("partial", "old"))
    try:
        if old.exists() and not target.exists():  # a kill between the two renames
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        check_target(target, overwrite, inputs, foreign)
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial, target)
        note = _take_over(partial, fingerprint)
        needed -= reusable(partial)
        free = shutil.disk_usage(partial.parent).free
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written ({error.strerror or error}); choose another output") from None
    if needed + _RESERVE > free:
        with contextlib.suppress(OSError):  # where something is in it, it stays for the next call
            partial.rmdir()
        os.close(lock)
        raise ConvertError(
            f"{target}: needs {_gib(needed)} and {partial.parent} has {_gib(free)} free; make room or choose an output "
            "on another disk"
        )
    try:
        if fingerprint is not None:
            (partial / _MARKER).write_text(json.dumps(fingerprint))
        yield Output(partial, note)
        check_target(target, overwrite, inputs, foreign)  # hours may have passed, in which somebody used the folder
        (partial / _MARKER).unlink(missing_ok=True)
        _put_in_place(partial, target, old)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise ConvertError(_explain(error, target, partial)) from None
        raise
    except BaseException:
        if fingerprint is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_target(target: Path, overwrite: bool, inputs: tuple[Path, ...] = (), foreign: Foreign = any_entry) -> None:
    """Raises ConvertError where `output_folder` would: the target exists, holds what no earlier call wrote, or is among
    the inputs. Writes nothing, so it can stand before a download, or before anything else that would be for nothing."""
    target = Path(os.path.realpath(target))
    for path in inputs:
        source = path.resolve()
        if source == target or target in source.parents:
            raise ConvertError(f"{target}: is the input or a folder around it; choose another output")
    if os.path.ismount(target):
        raise ConvertError(f"{target}: a disk is mounted there, which no folder can replace; choose a folder in it")
    if os.path.exists(target) and not overwrite:
        raise ConvertError(f"{target}: exists already; choose another output or give --overwrite")
    if os.path.exists(target) and not os.path.isdir(target):
        raise ConvertError(f"{target}: is a file, not a folder; choose another output")
    try:
        entry = foreign(target) if os.path.exists(target) and any(target.iterdir()) else None
    except OSError as error:
        raise ConvertError(f"{target}: cannot be read ({error.strerror or error}); choose another output") from None
    if entry is not None:
        raise ConvertError(
            f"{target}: holds {entry}, which is not of an earlier result of this command, and --overwrite replaces "
            "nothing else; choose another output, or remove that folder by hand"
        )


def _lock(partial: Path, target: Path) -> int:
    """Holds the folder for this process until the result is closed; the end of the process closes it too."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConvertError(f"{target}: another conversion is writing it now; wait for it or end it") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise  # and a file system without locks does without
    return handle


def _take_over(partial: Path, fingerprint: dict[str, Any] | None) -> str | None:
    """Empties the folder, unless it is of an earlier call like this one. Returns what to tell."""
    left = list(partial.iterdir())
    if not left:
        return None
    if fingerprint is not None and read_json(partial / _MARKER) == fingerprint:
        return f"went on with what an interrupted conversion had left in {partial}"
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"replaced {partial}, which an interrupted conversion had left"


def _explain(error: OSError, target: Path, partial: Path) -> str:
    reason, name = error.strerror or str(error), error.filename
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # copying names the file that is read
    if full or name is None or partial in Path(str(name)).parents:
        return f"{target}: writing failed ({reason}); make room or choose another output"
    return f"{name}: {reason}; nothing was written"


def _put_in_place(partial: Path, target: Path, old: Path) -> None:
    for path in (*partial.rglob("*"), partial):
        flush(path)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
