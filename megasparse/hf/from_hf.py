"""Hugging Face folder -> Megatron checkpoint, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megasparse.config import Config, parse_config
from megasparse.hf.assets import check_tokenizer, copy_assets, has_tokenizer
from megasparse.hf.config import SourceModel
from megasparse.hf.conversion import ASSETS_BYTES, DTYPES, Converted, Progress, adding_up, to_dtype
from megasparse.hf.megatron_files import write_checkpoint
from megasparse.hf.model_folder import ModelFolder
from megasparse.hf.output import any_entry, output_folder
from megasparse.small_files import read_json
from megasparse.training.checkpoint_files import MANIFEST, seal

ASSETS = "hf"
"""Folder, inside the checkpoint, of the tokenizer and what else came with the model."""
MODEL_YAML = "model.yaml"
"""Configuration to build on, inside the checkpoint."""


@dataclass(frozen=True)
class FromHf:
    """What to import. `dtype`: a key of DTYPES, or "auto" for the model's own.

    `down_by_neuron`: `down_proj` is stored [neurons, hidden]; None: as the model's files tell.
    """

    model: Path
    output: Path
    dtype: str = "auto"
    down_by_neuron: bool | None = None
    no_tokenizer: bool = False
    overwrite: bool = False


def convert_from_hf(options: FromHf, progress: Progress = lambda done, total: None) -> Converted:
    """Import a model as a checkpoint that any parallel layout loads (`checkpoint.load`).

    In memory at a time: one weight of one layer. The output is a checkpoint with `hf/` (tokenizer, generation config,
    the model's config.json) and `model.yaml`, a configuration to name as `base`.

    Raises:
        ConvertError: an input or the output cannot be used. Nothing is left behind.
    """
    folder = options.model
    source = ModelFolder(folder, options.down_by_neuron)
    described, listed = source.described, source.weights
    dtype = source.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    parameters = sum(weight.count for weight in listed)
    total = parameters * dtype.itemsize
    tokenizer = has_tokenizer(folder) and not options.no_tokenizer
    if tokenizer:
        assert described.model.vocab_size is not None
        check_tokenizer(folder, described.model.vocab_size)
    notes = _notes(described, tokenizer)
    advance = adding_up(progress, total)
    with output_folder(
        options.output,
        needed=total + ASSETS_BYTES,
        overwrite=options.overwrite,
        inputs=(folder,),
        foreign=foreign_to_import,
    ) as place:
        partial = place.path
        if place.note:
            notes.append(place.note)
        (partial / ASSETS).mkdir()
        copy_assets(folder, partial / ASSETS, tokenizer)
        (partial / ASSETS / "config.json").write_bytes((folder / "config.json").read_bytes())
        config = _config(described, options.output, dtype, tokenizer)
        (partial / MODEL_YAML).write_text(_yaml(config, options.output))
        common = {"run": {"step": 0, "config": config.model_dump(mode="json")}}
        write_checkpoint(
            partial,
            listed,
            described.model.num_layers,
            dtype,
            common,
            lambda weight: to_dtype(source.read(weight), dtype, folder, weight),
            advance,
        )
        seal(partial, step=0)
    source.close()
    return Converted(
        path=options.output,
        checkpoint=folder,
        architecture=described.architecture.class_name,
        dtype=dtype,
        parameters=parameters,
        nbytes=total,
        files=1,
        notes=notes,
    )


def foreign_to_import(folder: Path) -> str | None:
    """The first entry of a folder that no import wrote: its manifest lists all that it did write. A checkpoint of a
    training run has a manifest too, and no model.yaml in it."""
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not {MODEL_YAML, f"{ASSETS}/config.json"} <= files.keys():
        return any_entry(folder)
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return min((name for name in names if name not in files and name != MANIFEST), default=None)


def _notes(described: SourceModel, tokenizer: bool) -> list[str]:
    notes = []
    if described.activation != "relu":
        notes.append(
            f"its activation is {described.activation}; here it is relu, so the model's outputs change: train it on, "
            "with the L1 term once the loss has settled (sparsity.l1.start_step)"
        )
    if not tokenizer:
        notes.append("no tokenizer: set data.tokenizer to that of your data")
    return notes


def _config(described: SourceModel, output: Path, dtype: torch.dtype, tokenizer: bool) -> Config:
    """A complete configuration with the model and placeholders for what only a run knows."""
    place = output.absolute()
    precision = "fp32" if dtype == torch.float32 else "bf16"
    data: dict[str, Any] = {"sequence_length": min(described.max_position_embeddings, 4096)}
    if tokenizer:
        data["tokenizer"] = str(place / ASSETS)
    # Sizes are written out in full, so that they compare equal with those of a run that is based on them.
    fields = described.model.model_dump(mode="json", exclude_defaults=True)
    fields |= {key: getattr(described.model, key) for key in ("num_query_groups", "kv_channels", "vocab_size")}
    return parse_config(
        {
            "model": fields,
            "data": data,
            "training": {"global_batch_size": 1, "steps": 1, "precision": precision},
        },
        source=MODEL_YAML,
    )


def _yaml(config: Config, output: Path) -> str:
    dumped = config.model_dump(mode="json")
    defaults = {name: field.default for name, field in type(config.model).model_fields.items()}
    model = {key: value for key, value in dumped["model"].items() if defaults.get(key, ...) != value}
    content: dict[str, Any] = {
        "model": model,
        "data": {"sequence_length": config.data.sequence_length},
        "training": {"precision": config.training.precision},
        "checkpoint": {"load": str(output.absolute())},
    }
    if config.data.tokenizer:
        content["data"]["tokenizer"] = config.data.tokenizer
    head = "# The imported model. Name this file as `base` in the configuration of a run.\n"
    return head + yaml.safe_dump(content, sort_keys=False)
