"""Size of a tokenizer's vocabulary, as far as the configuration needs it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from megasparse.config.errors import ConfigError, Problem


@lru_cache(maxsize=8)
def tokenizer_vocab_size(path: str) -> int:
    """Largest token id + 1 of a `tokenizer.json` or a Hugging Face tokenizer directory.

    Ids can have gaps, so a count of tokens may be too small for an embedding. Raises ConfigError where the
    path holds no tokenizer.
    """
    file = Path(path)
    try:
        file = file / "tokenizer.json" if file.is_dir() else file
        if file.is_file():
            from tokenizers import Tokenizer

            vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        else:
            from transformers import AutoTokenizer

            vocabulary = AutoTokenizer.from_pretrained(path, local_files_only=True).get_vocab()
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise ConfigError(
            [
                Problem(
                    "data.tokenizer",
                    f"not a readable tokenizer ({error})",
                    "give a tokenizer.json or a Hugging Face tokenizer directory",
                    path,
                )
            ]
        ) from error
    return max(vocabulary.values()) + 1
