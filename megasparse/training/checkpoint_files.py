"""Checkpoints as directories: made complete before they get their name, found again, checked, thinned out.

    checkpoints/
      step_00000100/        a complete checkpoint: Megatron's dist_checkpointing files and, written last, manifest.json
      step_00000200/
      latest                text: the name of the newest complete checkpoint
      .step_00000300.partial-<random>   being written, or left over by a kill; removed at the next start

A checkpoint is written under its hidden name, flushed to disk, renamed in one move, and only then named in `latest`.
So a kill at any moment leaves the last good one loadable. `manifest.json` lists every file with its size and CRC-32:
sizes find truncated and missing files at once, checksums find changed bytes before anything is loaded.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("megasparse")

LATEST = "latest"
MANIFEST = "manifest.json"
_NAME = re.compile(r"^step_(\d{8,})$")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved or loaded; the message names the path and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint's files are not what was written."""


@dataclass(frozen=True)
class Found:
    """One checkpoint directory. `problem` is None where it is complete."""

    path: Path
    step: int
    problem: str | None


def checkpoint_name(step: int) -> str:
    """`step_00000100`: sorts by name as by step."""
    return f"step_{step:08d}"


def partial_directory(root: Path, step: int) -> Path:
    """A fresh hidden directory, so that a writer which outlived its killed parent writes elsewhere."""
    path = root / f".{checkpoint_name(step)}.partial-{uuid.uuid4().hex[:12]}"
    path.mkdir(parents=True)
    return path


def seal(directory: Path, step: int, checksums: dict[str, int] | None = None) -> None:
    """Ends the writing of a checkpoint: manifest, flush.

    Args:
        directory: what was written.
        step: of the checkpoint.
        checksums: CRC-32 of files by name, where they are known; those of the rest are computed here.

    Raises:
        CheckpointError: a file with a known checksum is not there: this machine does not see what another wrote.
    """
    known = checksums or {}
    missing = [name for name in known if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(known)} files that ranks have written to it, {min(missing)} for "
            "one: checkpoint.directory must be on storage that all nodes share"
        )
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = str(path.relative_to(directory))
        files[name] = {"bytes": path.stat().st_size, "crc32": known[name] if name in known else checksum(path)}
    _write_and_flush(directory / MANIFEST, json.dumps({"step": step, "files": files}, indent=1) + "\n")
    for name in files:
        flush(directory / name)
    flush(directory)


def publish(partial: Path, step: int, checksums: dict[str, int] | None = None) -> Path:
    """Completes a written checkpoint: `seal`, rename, `latest`. Returns its final path."""
    root = partial.parent
    seal(partial, step, checksums)
    final = root / checkpoint_name(step)
    if final.exists():  # a damaged one, or one of a run that was rolled back
        _remove(final)
    partial.rename(final)
    flush(root)
    set_latest(root, final.name)
    return final


def set_latest(root: Path, name: str) -> None:
    """Points `latest` to a checkpoint, in one move."""
    temporary = root / f".{LATEST}.tmp"
    _write_and_flush(temporary, name + "\n")
    temporary.replace(root / LATEST)
    flush(root)


def read_latest(root: Path) -> str | None:
    """The name in `latest`, or None."""
    try:
        return (root / LATEST).read_text().strip() or None
    except FileNotFoundError:
        return None


def checksum(file: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def examine(path: Path, share: Callable[[int], bool] = lambda index: True, content: bool = False) -> str | None:
    """What is wrong with a checkpoint directory, or None.

    Args:
        path: the checkpoint.
        share: which files, by their number, are looked at.
        content: whether they are read and compared with their checksum too; else their sizes alone count.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {name: (int(facts["bytes"]), int(facts["crc32"])) for name, facts in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for index, (name, (size, crc)) in enumerate(files.items()):
        if not share(index):
            continue
        try:
            actual = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} bytes instead of {size}"
        try:
            changed = content and checksum(path / name) != crc
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if changed:
            return f"the content of {name} has changed since it was written (its CRC-32 differs)"
    return None


def step_of(name: str) -> int | None:
    """Of `checkpoint_name`; None for other names."""
    match = _NAME.match(name)
    return int(match.group(1)) if match else None


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Step and path of all checkpoints under `root`, newest step first, damaged ones too. Looks into none."""
    if not root.is_dir():
        return []
    steps = ((step_of(path.name), path) for path in root.iterdir())
    return sorted(((step, path) for step, path in steps if step is not None and path.is_dir()), reverse=True)


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).exists() or step_of(path.name) is not None


def may_hold_checkpoint(path: Path) -> bool:
    """Whether `resolve` has something to look into: a checkpoint, a checkpoint directory, or a run directory."""
    return _is_checkpoint(path) or any(list_checkpoints(root) for root in (path, path / "checkpoints"))


def find_checkpoints(root: Path) -> Iterator[Found]:
    """All checkpoints under `root`, newest step first, damaged ones too.

    Each is looked at only when its turn comes: a run may keep hundreds, each with a file or two of every rank.
    """
    for step, path in list_checkpoints(root):
        yield Found(path, step, examine(path))


def resolve(path: Path) -> Path:
    """A checkpoint, from the path of one, of a checkpoint directory, or of a run directory (the newest complete one;
    newer ones that are damaged are logged).

    Raises:
        CheckpointError: there is no complete checkpoint there.
    """
    if _is_checkpoint(path):
        problem = examine(path)
        if problem is not None:
            raise DamagedError(f"{path} is not a complete checkpoint: {problem}")
        return path
    for root in (path, path / "checkpoints"):
        for found in find_checkpoints(root):
            if found.problem is None:
                return found.path
            log.warning("checkpoint: DAMAGED, trying the one before: %s: %s", found.path, found.problem)
    raise CheckpointError(f"{path}: no complete checkpoint there; give a checkpoint, its folder, or a run directory")


def prune(
    root: Path, newest: int, keep_last: int, keep_every: int | None, damaged: Collection[Path] = ()
) -> list[Path]:
    """Removes old checkpoints; only complete ones count as kept, so the last good one always stays.

    Args:
        root: where they are.
        newest: step of the one that was just saved. Later ones are left alone and do not count: the run could not
            load them, though the sizes of their files, all that is looked at here, may be right.
        keep_last: how many.
        keep_every: steps divisible by this stay.
        damaged: those whose content is known not to be what was written, though the sizes are.

    Returns:
        what was removed. Damaged directories are left for the user to look at.
    """
    kept, removed = 0, []
    for step, path in list_checkpoints(root):
        if step > newest or path in damaged:
            continue
        if kept < max(1, keep_last):
            kept += examine(path) is None
        elif not (keep_every and step % keep_every == 0) and examine(path) is None:
            try:
                _remove(path)
            except OSError as error:  # what was just saved is there: no reason to end the run
                log.warning("checkpoint: %s cannot be removed (%s)", path, error.strerror)
            else:
                removed.append(path)
    return removed


def write_problem(directory: Path) -> str | None:
    """Why no file of a mebibyte can be written to a directory now, or None."""
    path = directory / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        path.write_bytes(bytes(1 << 20))
    except OSError as error:
        return str(error)
    finally:
        with suppress(OSError):
            path.unlink()
    return None


def remove_leftovers(root: Path) -> None:
    """Removes what killed runs left half-written or half-deleted."""
    for path in _leftovers(root):
        shutil.rmtree(path, ignore_errors=True)


def leftover_bytes(root: Path) -> int:
    """Of what `remove_leftovers` will remove."""
    total = 0
    for path in _leftovers(root):
        for folder, _, names in os.walk(path):
            for name in names:
                with suppress(OSError):
                    total += os.stat(os.path.join(folder, name)).st_blocks * 512
    return total


def _leftovers(root: Path) -> list[Path]:
    if not os.path.isdir(root):  # nor in a folder that cannot be looked into
        return []
    return [path for pattern in (".step_*.partial-*", ".trash-*") for path in root.glob(pattern)]


def _remove(path: Path) -> None:
    """Takes the name away first, so that a kill in between leaves no half of a checkpoint under it."""
    trash = path.parent / f".trash-{path.name}-{uuid.uuid4().hex[:8]}"
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _write_and_flush(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """fsync of a file or a directory entry."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
