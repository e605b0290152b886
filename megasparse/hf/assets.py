"""What travels with the weights: tokenizer, chat template, generation config, special token ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megasparse.config import ConfigError
from megasparse.config.vocab import tokenizer_vocab_size
from megasparse.hf import tokenizer_reading
from megasparse.hf.errors import ConvertError, first_line
from megasparse.hub import HubError, local_tokenizer
from megasparse.small_files import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
_ADVICE = "name another with --tokenizer PATH, or leave it out with --no-tokenizer"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def find_tokenizer(name: str) -> Path:
    """Where a Hugging Face folder, a tokenizer.json, or a tokenizer of the hub lies here; the last is downloaded.

    Raises ConvertError where there is no tokenizer.
    """
    try:
        return local_tokenizer(name)
    except HubError as error:
        raise ConvertError(f"tokenizer {error}; or {_ADVICE}") from None


def write_tokenizer(path: Path, vocab_size: int, output: Path, model_type: str) -> tuple[dict[str, Any], list[str]]:
    """Put a tokenizer and what lies beside it into a model's folder, so that `AutoTokenizer` loads it there and
    encodes as training did.

    Args:
        path: a Hugging Face folder, or a tokenizer.json.
        vocab_size: of the model, which must hold every token.
        model_type: of the model. The folder gets a config.json that says it alone.

    Returns:
        bos_token_id, eos_token_id, pad_token_id, as far as the folder or the tokenizer knows them; and what to tell.

    Raises:
        ConvertError: transformers does not load it, or it has more tokens than the model.
    """
    notes = []
    tokenizer = _put(path, output, model_type)
    if not tokenizer_reading.encodes_alike(output, tokenizer):
        class_name = type(tokenizer).__name__
        tokenizer_reading.take_file_as_it_is(output)
        tokenizer = tokenizer_reading.load(output)
        note = f"tokenizer_class is PreTrainedTokenizerFast: as {class_name} transformers encodes otherwise"
        if not tokenizer_reading.encodes_alike(output, tokenizer):
            note = "transformers does not encode all text as the tokenizer's tokenizer.json does: compare before use"
        notes.append(note)
    size = max(tokenizer.get_vocab().values()) + 1
    if size > vocab_size:
        raise ConvertError(
            f"tokenizer {path}: has {size} tokens, the model {vocab_size}; give the tokenizer that the model was "
            "trained with (--tokenizer PATH)"
        )
    if size < vocab_size:
        notes.append(f"the tokenizer uses {size} of the model's {vocab_size} tokens")
    ids = {key: value for key in _IDS if (value := getattr(tokenizer, key)) is not None}
    for name in ("config.json", GENERATION):
        found = read_json((path if path.is_dir() else path.parent) / name)
        ids.update({key: value for key, value in found.items() if key in _IDS})
    return ids, notes


def suits_qwen2(path: Path) -> bool:
    """Whether transformers encodes as training did with this tokenizer in the folder of a Qwen2 model.

    Raises ConvertError where transformers does not load it.
    """
    with TemporaryDirectory() as folder:
        return tokenizer_reading.is_of_qwen2(Path(folder), _put(path, Path(folder), "qwen2"))


def _put(path: Path, output: Path, model_type: str) -> Any:
    """Copies or saves a tokenizer into the folder of a model and loads it there."""
    folder, file = (path, path / tokenizer_reading.FILE) if path.is_dir() else (path.parent, path)
    described = (folder / tokenizer_reading.SETTINGS).is_file()
    try:
        if path.is_dir() or (path.is_file() and described):
            copy_assets(folder, output)
        if file.is_file() and not described:
            _from_json(file, output)
        elif path.is_file() and path.name not in TOKENIZER_FILES:
            shutil.copyfile(path, output / tokenizer_reading.FILE)
        (output / "config.json").write_text(json.dumps({"model_type": model_type}))  # the class depends on it
        return tokenizer_reading.load(output)
    except Exception as error:  # transformers raises many types
        raise ConvertError(
            f"tokenizer {path}: does not load in transformers ({first_line(error)}); {_ADVICE}"
        ) from None


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raises ConvertError where a folder's tokenizer cannot be read or has more tokens than its model."""
    advice = "give the tokenizer that belongs to the model, or leave it out with --no-tokenizer"
    try:
        size = tokenizer_vocab_size(str(folder))
    except ConfigError as error:
        raise ConvertError(f"{folder}: its tokenizer is {error.problems[0].rule}; {advice}") from None
    if size > vocab_size:
        raise ConvertError(
            f"{folder}: its tokenizer has {size} tokens, and config.json says vocab_size {vocab_size}; {advice}"
        )


def copy_assets(source: Path, output: Path, tokenizer: bool = True) -> None:
    """Copy the tokenizer's files, chat templates and generation config of a folder, as far as they are there."""
    for name in (*TOKENIZER_FILES, GENERATION) if tokenizer else (GENERATION,):
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, output / TEMPLATES, dirs_exist_ok=True)


def write_generation_config(output: Path, token_ids: dict[str, Any]) -> None:
    """generation_config.json, unless one was carried along."""
    if not (output / GENERATION).exists():
        content = {
            "_from_model_config": True,
            **{key: token_ids[key] for key in _IDS if token_ids.get(key) is not None},
        }
        (output / GENERATION).write_text(json.dumps(content, indent=2) + "\n")


def _from_json(path: Path, output: Path) -> None:
    """A tokenizer.json alone: transformers needs to be told its class and special tokens."""
    from megasparse.data.errors import DataError
    from megasparse.data.tokenizer import load_tokenizer

    try:
        load_tokenizer(str(path)).save(output)
    except DataError:  # nothing says which token ends a document: pass it on as it is
        shutil.copyfile(path, output / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
