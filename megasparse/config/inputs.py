"""Whether the files that a run reads are there and belong together, and whether it can write."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasparse.config.errors import ConfigError, Problem
from megasparse.config.schema import Config
from megasparse.data.index_file import damage
from megasparse.small_files import read_json


def check_files(cfg: Config) -> None:
    """Data, tokenizer and checkpoint must be there, the data whole and made with that tokenizer.

    Raises ConfigError naming what is not so. Data sets of other tools, without the `.json` that `megasparse
    preprocess` writes beside them, are taken as they are.
    """
    problems = [*_missing_files(cfg)]
    if not problems:
        problems += [*_damaged_data(cfg), *_foreign_tokens(cfg)]
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
        ("data.cache_dir", Path(os.path.expandvars(cfg.cache_directory))),
    ):
        there = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            continue
        reason = "is not writable" if there.is_dir() else "is not a directory"
        fix = "choose another place, or make that one writable"
        problems.setdefault(there, Problem(key, f"{there} {reason}", fix, str(path)))
    if problems:
        raise ConfigError(list(problems.values()), host_specific=True)


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
            yield Problem("data", f"{' and '.join(reasons)} {here}", fix, prefix)
    if cfg.data.tokenizer and (reason := _unreadable(cfg.data.tokenizer, "no such file")):
        fix = "give a tokenizer.json or a Hugging Face tokenizer directory"
        yield Problem("data.tokenizer", f"{reason} {here}", fix, cfg.data.tokenizer)
    if cfg.checkpoint.load and (reason := _unreadable(cfg.checkpoint.load, "no such path")):
        fix = "give a checkpoint or run directory"
        yield Problem("checkpoint.load", f"{reason} {here}", fix, cfg.checkpoint.load)


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
            yield Problem("data", rule, "copy it again, or write it anew with `megasparse preprocess`", prefix)


def describe_data(prefix: str) -> dict[str, Any]:
    """What `megasparse preprocess` wrote beside a data set; nothing for those of other tools."""
    return read_json(Path(prefix + ".json"))


def _foreign_tokens(cfg: Config) -> Iterator[Problem]:
    described = {prefix: describe_data(prefix) for prefix in cfg.data.prefixes}
    for prefix, description in described.items():
        size = description.get("vocab_size")
        if isinstance(size, int) and cfg.model.vocab_size is not None and size > cfg.model.vocab_size:
            rule = f"the data {prefix} has tokens of a vocabulary of {size}"
            yield Problem("model.vocab_size", rule, f"set at least {size}", cfg.model.vocab_size)
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
            yield Problem("data", rule, "tokenise it again, or name the right data.tokenizer", prefix)
