"""A checkpoint of `megasparse pretrain` to convert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from megasparse.config import ModelConfig
from megasparse.hf.architectures import architecture_of
from megasparse.hf.errors import ConvertError
from megasparse.hf.megatron_files import CheckpointReader
from megasparse.hf.tensors import Weight, weights
from megasparse.training.checkpoint_files import CheckpointError, resolve


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. `weights` are checked to be there, in their shapes; vocabularies as padded in the file."""

    path: Path
    reader: CheckpointReader
    model: ModelConfig
    vocab_size: int
    max_position_embeddings: int
    tokenizer: str | None
    weights: list[Weight]


def open_checkpoint(path: Path) -> Source:
    """Open a checkpoint, given its folder, the folder around it, or the run's.

    Raises:
        ConvertError: it is none, is damaged, or of a model that cannot be converted.
    """
    path = _locate(path)
    reader = CheckpointReader(path)
    common = reader.common()
    if not isinstance(common.get("run"), dict) or "config" not in common["run"]:
        raise ConvertError(
            f"{path}: was not written by megasparse (its plain values hold no configuration); only checkpoints of "
            "megasparse can be converted"
        )
    model, positions, tokenizer = _of_run(path, common["run"]["config"])
    if model.vocab_size is None:
        raise ConvertError(
            f"{path}: its configuration has no model.vocab_size; resume the run with it set, and save again"
        )
    architecture = architecture_of(model)
    listed = weights(model, architecture, model.vocab_size)
    for weight in listed:
        reader.check(weight, model.num_layers)
    rows = reader.vocab_rows(listed[0])
    if rows < model.vocab_size:
        raise ConvertError(
            f"{path}: the embedding has {rows} rows, fewer than model.vocab_size {model.vocab_size}; it is a "
            "checkpoint of another model"
        )
    return Source(path, reader, model, model.vocab_size, positions, tokenizer, weights(model, architecture, rows))


def _locate(path: Path) -> Path:
    if not path.exists():
        raise ConvertError(f"{path}: not there; give a checkpoint, or a run's folder")
    try:
        return resolve(path)
    except CheckpointError as error:
        raise ConvertError(str(error)) from None


def _of_run(path: Path, config: dict[str, Any]) -> tuple[ModelConfig, int, str | None]:
    try:
        model = ModelConfig.model_validate(config["model"])
        positions = model.max_position_embeddings or int(config["data"]["sequence_length"])
    except (pydantic.ValidationError, KeyError, TypeError) as error:
        raise ConvertError(
            f"{path}: its configuration is not understood ({error}); was it saved by a newer megasparse?"
        ) from None
    return model, positions, config["data"].get("tokenizer")
