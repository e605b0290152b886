"""Tokenizers: any Hugging Face one, or a byte-level BPE trained here. Imports neither torch nor Megatron."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megasparse.data.errors import DataError
from megasparse.hub import HubError, local_tokenizer
from megasparse.small_files import read_json

END_OF_DOCUMENT = "<|endoftext|>"
TRAINED_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What `TextTokenizer.save` writes of a tokenizer that was trained here."""
_UNWRITTEN = "\ufdd0" * 8
"""Of a character that Unicode sets aside for the inside of programs: no text begins a word with it."""
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


class TextTokenizer:
    """Text <-> token ids.

    Special tokens written out in a text are encoded as ordinary text: no document can forge its end.
    `vocab_size` is the largest id + 1; `eod` the id that ends a document. `eod`, `vocab_size` and
    `unique_identifiers` are what Megatron's GPTDataset asks of a tokenizer.
    """

    def __init__(self, path: str, backend: Any, eod_token: str) -> None:
        self.path = path
        self.eod_token = eod_token
        self._backend = backend
        self._fast = not hasattr(backend, "convert_tokens_to_ids")
        vocabulary = backend.get_vocab()
        if eod_token not in vocabulary:
            raise DataError(f"tokenizer {path}: no token {eod_token!r}; name its end-of-document token with --eod")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eod: int = vocabulary[eod_token]
        if self._fast:
            backend.encode_special_tokens = True
            backend.no_truncation()  # a tokenizer.json may bring both along, for models of another kind
            backend.no_padding()
            digest = hashlib.sha256(backend.to_str().encode())
            self._encoder = _encoder(backend, eod_token)
        else:
            digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode())
        self.fingerprint: str = digest.hexdigest()[:16]
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict(
            {"class": type(self).__name__, "fingerprint": self.fingerprint}
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without the end-of-document token."""
        if self._fast:
            return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]
        return [self._backend.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def save(self, directory: Path) -> None:
        """Write a Hugging Face tokenizer directory, which `load_tokenizer` and `AutoTokenizer` read. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        if self._fast:
            self._backend.encode_special_tokens = False  # a property of how we encode, not of the tokenizer
            text = self._backend.to_str(pretty=True)  # its own `save` raises bare Exception where a disk is full
            (directory / "tokenizer.json").write_text(text, encoding="utf-8")
            self._backend.encode_special_tokens = True
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": self.eod_token,
                "eos_token": self.eod_token,
                "clean_up_tokenization_spaces": False,
                "model_max_length": int(1e30),
            }
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
        else:
            self._backend.save_pretrained(str(directory))


def _encoder(backend: Any, eod_token: str) -> Any:
    """`backend`, or where texts could forge special tokens all the same, a copy with the same ids in which they cannot.

    A Unigram model has special tokens among its pieces, with the best score of all. And the end of a document need not
    be marked as special.
    """
    from tokenizers import Tokenizer, models

    added = backend.get_added_tokens_decoder().values()
    unigram = isinstance(backend.model, models.Unigram)
    if not unigram and all(token.special for token in added if token.content == eod_token):
        return backend
    described = json.loads(backend.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["special"] or token["content"] == eod_token
        if unigram and token["special"]:
            token["content"] = _UNWRITTEN + token["content"]
            if token["id"] < len(described["model"]["vocab"]):
                described["model"]["vocab"][token["id"]][0] = token["content"]
    copy = Tokenizer.from_str(json.dumps(described))
    copy.encode_special_tokens = True
    return copy


def load_tokenizer(path: str, eod_token: str | None = None) -> TextTokenizer:
    """A `tokenizer.json`, a Hugging Face tokenizer directory, or a name on the Hugging Face hub.

    `eod_token`: None takes the tokenizer's own end-of-sequence token. Raises DataError where there is no
    tokenizer or no such token.
    """
    try:
        place = local_tokenizer(path)
    except HubError as error:
        raise DataError(str(error)) from None
    backend, end = read_backend(place)
    eod_token = eod_token or end
    if eod_token is None:
        raise DataError(f"tokenizer {place}: does not say which token ends a document; name it with --eod")
    return TextTokenizer(str(place), backend, eod_token)


def read_backend(path: Path) -> tuple[Any, str | None]:
    """What `tokenizers` makes of a tokenizer.json or, where there is none, transformers of a folder; and the token that
    ends a document, where the files tell it. Raises DataError where there is no tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    backend: Any
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{file}: not a tokenizer.json ({error})") from None
        return backend, _configured_end(file.parent) or _known_end(backend)
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(path, use_fast=False, local_files_only=True)
    except Exception as error:  # no such files, missing sentencepiece: many types
        raise DataError(f"{path}: holds no tokenizer that transformers loads ({error})") from None
    inner = getattr(backend, "backend_tokenizer", None)
    return inner if inner is not None else backend, backend.eos_token


def train_tokenizer(texts: Iterator[str], vocab_size: int, directory: Path) -> TextTokenizer:
    """Train a byte-level BPE (every text round-trips) and save it as a Hugging Face tokenizer directory.

    `vocab_size` counts the 256 bytes and the end-of-document token; little text can give fewer. Raises
    DataError where it is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise DataError(f"--train-tokenizer {vocab_size}: at least 257 (256 bytes and the end of a document)")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = TextTokenizer(str(directory), backend, END_OF_DOCUMENT)
    tokenizer.save(directory)
    return tokenizer


def _configured_end(directory: Path) -> str | None:
    """`eos_token` of a Hugging Face tokenizer_config.json."""
    token = read_json(directory / "tokenizer_config.json").get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _known_end(backend: Any) -> str | None:
    return next((token for token in _KNOWN_ENDS if backend.token_to_id(token) is not None), None)
