"""Whether the files that a run reads are there and belong together, and whether it can write."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasparse.config.errors import ConfigError, Problem
from megasparse.config.schema import Config
from megasparse.data.index_file import damage, largest_token
from megasparse.small_files import read_json


def check_files(cfg: Config) -> None:
    """Data and tokenizer must be there, the data whole and made with that tokenizer; so must the checkpoint that a run
    starts from, where it has none of its own.

    Raises ConfigError naming what is not so. Of data sets of other tools, without the `.json` that `megasparse
    preprocess` writes beside them, some tokens are read to see whether the vocabulary has them.
    """
    problems = [*_missing_files(cfg)] or [*_damaged_data(cfg)] or [*_foreign_tokens(cfg)]
    if problems:
        raise ConfigError(problems, host_specific=True)


def check_directories(cfg: Config) -> None:
    """Where the run writes must be a directory that can be written, or that can be made.

    Raises ConfigError naming key and path.
    """
    problems: dict[Path, Problem] = {}
    for key, path in (
        ("run.directory", cfg.run_directory),
        ("checkpoint.directory", cfg.checkpoint_directory),
        ("logging.directory", cfg.logging_directory),
        ("data.cache_dir", cfg.cache_directory),
    ):
        there = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            continue
        if key == "data.cache_dir" and os.access(path, os.R_OK | os.X_OK) and any(path.glob("*.npy")):
            continue  # made by others: complete, it is only read
        reason = "is not writable" if there.is_dir() else "is not a directory"
        fix = "choose another place, or make that one writable"
        problems.setdefault(there, Problem(key, f"{there} {reason}", fix, str(path)))
    if problems:
        raise ConfigError(list(problems.values()), host_specific=True)


LEAST_FREE = 16 << 20
"""Bytes for metrics and a report, to begin with."""


def check_space(cfg: Config, needed: int, leftovers: int = 0) -> None:
    """There must be room for one checkpoint of `needed` bytes: a run that cannot save any had better not start.

    `leftovers`: bytes in the checkpoint directory that the start will free. Raises ConfigError naming the directories.
    """
    problems: dict[Path, Problem] = {}
    of_checkpoints = existing_parent(cfg.checkpoint_directory).stat().st_dev
    for key, path, what, size in (
        ("checkpoint.directory", cfg.checkpoint_directory, "a checkpoint takes", needed),
        ("run.directory", cfg.run_directory, "a run begins with", LEAST_FREE),
        ("logging.directory", cfg.logging_directory, "metrics begin with", LEAST_FREE),
    ):
        there = existing_parent(path)
        disk = shutil.disk_usage(there)
        free = disk.free + (leftovers if there.stat().st_dev == of_checkpoints else 0)
        if disk.total > 0 and free < size:  # some file systems do not count
            rule = f"{what} {size / 2**30:.3g} GiB, and {there} has {free / 2**30:.3g} GiB free"
            problems.setdefault(there, Problem(key, rule, "make room, or choose another place", str(path)))
    if problems:
        raise ConfigError(list(problems.values()), host_specific=True)


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that can be seen: those of other users may hide what is in them."""
    path = path.absolute()
    while not os.path.isdir(path):
        path = path.parent
    return path


def _missing_files(cfg: Config) -> Iterator[Problem]:
    here = f"(working directory: {Path.cwd()})"
    if not cfg.data.prefixes:
        yield Problem(
            "data.blend",
            "a run needs data, and neither data.blend nor data.train is given",
            "write one with `megasparse preprocess` and set data.blend to its --output",
        )
    for prefix in cfg.data.prefixes:
        files = (prefix + ".bin", prefix + ".idx")
        if reasons := [reason for file in files if (reason := _unreadable(file, f"no file {file}"))]:
            fix = "write it with `megasparse preprocess`, or have it made readable; prefixes are without .bin/.idx"
            bare = prefix.removesuffix(".bin").removesuffix(".idx")
            if bare != prefix and os.path.exists(bare + ".idx"):
                fix = f"write {bare}: prefixes are without .bin/.idx"
            elif " " in prefix:
                fix = "several data sets are [prefix, ...] or [[weight, prefix], ...]"
            yield Problem(_key_of(cfg, prefix), f"{' and '.join(reasons)} {here}", fix, prefix)
    if cfg.data.tokenizer and (reason := _unreadable(cfg.data.tokenizer, "no such file")):
        fix = "give a tokenizer.json or a Hugging Face tokenizer directory"
        yield Problem("data.tokenizer", f"{reason} {here}", fix, cfg.data.tokenizer)
    begun = any(cfg.checkpoint_directory.glob("step_*"))  # then the run goes on from its own
    if cfg.checkpoint.load and not begun and (reason := _unreadable(cfg.checkpoint.load, "no such path")):
        fix = "give a checkpoint or run directory"
        yield Problem("checkpoint.load", f"{reason} {here}", fix, cfg.checkpoint.load)


def _key_of(cfg: Config, prefix: str) -> str:
    """The key that names a data set; `data.valid` where it is one of several, as `evaluate` has it stand for all."""
    keys = [key for key, blend in cfg.data.blends.items() if prefix in [name for _, name in blend]]
    return f"data.{'valid' if 'valid' in keys else keys[0]}"


def _unreadable(path: str, absent: str) -> str | None:
    """Why `path` cannot be read (`absent`: because it is not there), or None. Folders of other users may not even say
    what is in them."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return absent
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if os.access(path, os.R_OK) else f"{path} cannot be read: {os.strerror(errno.EACCES)}"


def _damaged_data(cfg: Config) -> Iterator[Problem]:
    for prefix in cfg.data.prefixes:
        rule = damage(prefix)
        if rule is not None:
            fix = "copy it again, or write it anew with `megasparse preprocess`"
            yield Problem(_key_of(cfg, prefix), rule, fix, prefix)


def describe_data(prefix: str) -> dict[str, Any]:
    """What `megasparse preprocess` wrote beside a data set; nothing for those of other tools."""
    return read_json(Path(prefix + ".json"))


def _foreign_tokens(cfg: Config) -> Iterator[Problem]:
    described = {prefix: describe_data(prefix) for prefix in cfg.data.prefixes}
    for prefix, description in described.items():
        size = description.get("vocab_size")
        if isinstance(size, int) and cfg.model.vocab_size is not None and size > cfg.model.vocab_size:
            rule = f"the data {prefix} has tokens of a vocabulary of {size}"
            fix = f"set at least {size}, or tokenise the data with the tokenizer of this model"
            yield Problem("model.vocab_size", rule, fix, cfg.model.vocab_size)
        if size is None and cfg.model.vocab_size is not None:  # of another tool
            token = largest_token(prefix)
            if token >= cfg.model.vocab_size:
                rule = f"the data {prefix} has the token {token}"
                fix = f"set at least {token + 1}, or tokenise the data with the tokenizer of this model"
                yield Problem("model.vocab_size", rule, fix, cfg.model.vocab_size)
    made_with = {prefix: d["tokenizer_fingerprint"] for prefix, d in described.items() if "tokenizer_fingerprint" in d}
    if not made_with:
        return
    wanted = next(iter(made_with.values()))
    which = f"the tokenizer of {next(iter(made_with))}"
    if cfg.data.tokenizer:
        from megasparse.data.tokenizer import load_tokenizer  # a leaf of the package

        first = described[next(iter(made_with))]
        wanted = load_tokenizer(cfg.data.tokenizer, first.get("eod_token")).fingerprint
        which = f"data.tokenizer = {cfg.data.tokenizer}"
    for prefix, fingerprint in made_with.items():
        if fingerprint != wanted:
            rule = f"made with another tokenizer ({described[prefix].get('tokenizer')}) than {which}"
            fix = "tokenise it again, or name the right data.tokenizer"
            yield Problem(_key_of(cfg, prefix), rule, fix, prefix)
