"""Size of a tokenizer's vocabulary, as far as the configuration needs it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from megasparse.config.errors import ConfigError, Problem
from megasparse.data.errors import DataError
from megasparse.data.tokenizer import read_backend


@lru_cache(maxsize=8)
def tokenizer_vocab_size(path: str) -> int:
    """Largest token id + 1 of a `tokenizer.json` or a Hugging Face tokenizer directory.

    Ids can have gaps, so a count of tokens may be too small for an embedding. Raises ConfigError where the
    path holds no tokenizer.
    """
    try:
        backend, _ = read_backend(Path(path))
    except DataError as error:
        fix = "give a tokenizer.json or a Hugging Face tokenizer directory"
        raise ConfigError([Problem("data.tokenizer", f"not a readable tokenizer ({error})", fix, path)]) from error
    return max(backend.get_vocab().values()) + 1
