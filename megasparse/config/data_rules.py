"""Rules of data, tokenizer, validation and paths."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megasparse.config.errors import Problem
from megasparse.config.schema import Config


def _data(cfg: Config) -> Iterator[Problem]:
    data = cfg.data
    if data.blend and (data.train or data.valid or data.test):
        yield Problem(
            "data.blend",
            "given beside data.train/valid/test",
            "use blend with split, or train, valid and test, not both",
        )
    elif not data.train and (data.valid or data.test):
        yield Problem("data.train", "missing beside data.valid/test", "give a blend for training", None)
    try:
        weights = data.split_weights
    except ValueError:
        rule = "not three plain numbers >= 0 separated by commas"
        yield Problem("data.split", rule, 'for example "969,30,1"', data.split)
    else:
        if data.blend and weights[0] == 0:
            yield Problem("data.split", "leaves nothing for training", 'for example "969,30,1"', data.split)


def _tokenizer(cfg: Config) -> Iterator[Problem]:
    from megasparse.config.vocab import tokenizer_vocab_size

    if cfg.model.vocab_size is None or not cfg.data.tokenizer or not os.path.exists(cfg.data.tokenizer):
        return
    size = tokenizer_vocab_size(cfg.data.tokenizer)
    if size > cfg.model.vocab_size:
        yield Problem(
            "model.vocab_size",
            f"the tokenizer {cfg.data.tokenizer} has {size} tokens",
            f"set at least {size}, or leave it out",
            cfg.model.vocab_size,
        )


def _evaluation(cfg: Config) -> Iterator[Problem]:
    if cfg.data.blend and cfg.training.eval_steps and _split_of(cfg)[1] == 0:
        yield Problem(
            "data.split",
            f"leaves nothing for validation while training.eval_steps is {cfg.training.eval_steps}",
            "give validation a share or set training.eval_steps: 0",
            cfg.data.split,
        )


def _paths(cfg: Config) -> Iterator[Problem]:
    """`~` is the home folder at the start of a word of the shell alone, not in `key=~/folder` nor in a file."""
    for key, path in (
        ("run.directory", cfg.run.directory),
        ("data.cache_dir", cfg.data.cache_dir),
        ("data.tokenizer", cfg.data.tokenizer),
        ("checkpoint.directory", cfg.checkpoint.directory),
        ("checkpoint.load", cfg.checkpoint.load),
        ("logging.directory", cfg.logging.directory),
        *(("data", prefix) for prefix in cfg.data.prefixes),
    ):
        if path is not None and path.startswith("~"):
            yield Problem(
                key,
                "~ would be a folder of that name in the working directory",
                f"write {os.path.expanduser(path)}",
                path,
            )


def _split_of(cfg: Config) -> tuple[float, float, float]:
    try:
        return cfg.data.split_weights
    except ValueError:  # reported by _data
        return 1.0, 1.0, 1.0


RULES = (_data, _tokenizer, _evaluation, _paths)
