"""Megatron checkpoint -> Hugging Face folder, weight by weight."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megasparse.hf.architectures import Architecture, architecture_of
from megasparse.hf.assets import (
    GENERATION,
    TEMPLATES,
    TOKENIZER_FILES,
    find_tokenizer,
    suits_qwen2,
    write_generation_config,
    write_tokenizer,
)
from megasparse.hf.config import to_hf_config
from megasparse.hf.conversion import ASSETS_BYTES, DTYPES, Converted, Progress, adding_up, to_dtype
from megasparse.hf.errors import ConvertError
from megasparse.hf.output import check_target, output_folder
from megasparse.hf.safetensors_files import INDEX, Planned, index_of, is_complete, plan_files, write_file
from megasparse.hf.source import Source, open_checkpoint
from megasparse.hf.tensors import Weight, hf_shapes, split, zero_tensors
from megasparse.small_files import read_json
from megasparse.training.checkpoint_files import examine

_WRITTEN = ("config.json", GENERATION, INDEX, *TOKENIZER_FILES)
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


@dataclass(frozen=True)
class ToHf:
    """What to export. `dtype`: a key of DTYPES, or "auto" for the checkpoint's own."""

    checkpoint: Path
    output: Path
    dtype: str = "auto"
    shard_bytes: int = 5 * 10**9
    tokenizer: str | None = None
    """None: the one that the run was trained with."""
    no_tokenizer: bool = False
    overwrite: bool = False


def convert_to_hf(options: ToHf, progress: Progress = lambda done, total: None) -> Converted:
    """Export a checkpoint of any parallel layout.

    In memory at a time: one weight of one layer (as stored, and converted). An interrupted export goes on, when it is
    started again with the same options, with the file that was being written.

    Raises:
        ConvertError: an input or the output cannot be used. Nothing is left behind.
    """
    source = open_checkpoint(options.checkpoint)
    model, vocab_size = source.model, source.vocab_size
    dtype = source.reader.dtype(source.weights[0]) if options.dtype == "auto" else DTYPES[options.dtype]
    notes = []
    tokenizer = _tokenizer(source, options)
    check_target(options.output, options.overwrite, _inputs(source, tokenizer), foreign_to_export)
    if tokenizer is None and not options.no_tokenizer:
        notes.append("no tokenizer: the run names none (data.tokenizer); give it with --tokenizer PATH")

    architecture, instead_of_qwen2 = _architecture(source, tokenizer)
    if instead_of_qwen2:
        notes.append(
            f"{architecture.class_name} with biases, not Qwen2ForCausalLM: of Qwen2 models transformers reads every "
            "tokenizer as Qwen2's, which this one is not"
        )

    tensors = _Tensors(source, dtype, architecture)
    files = plan_files(tensors.planned, options.shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.planned)
    problem = examine(source.path, content=True)
    if problem is not None:
        raise ConvertError(f"{source.path}: {problem}; use another checkpoint")

    def reusable(folder: Path) -> int:
        complete = (group for name, group in files.items() if is_complete(folder / name, group))
        return sum(tensor.nbytes for group in complete for tensor in group)

    advance = adding_up(progress, total)
    with output_folder(
        options.output,
        needed=total + ASSETS_BYTES,
        overwrite=options.overwrite,
        fingerprint=_fingerprint(source, options, dtype, tokenizer),
        inputs=_inputs(source, tokenizer),
        reusable=reusable,
        foreign=foreign_to_export,
    ) as place:
        folder = place.path
        if place.note:
            notes.append(place.note)
        ids: dict[str, Any] = {}
        if tokenizer is not None:
            ids, more = write_tokenizer(tokenizer, vocab_size, folder, architecture.model_type)
            notes += more
        name = str(dtype).removeprefix("torch.")
        config = to_hf_config(model, vocab_size, source.max_position_embeddings, name, ids, architecture)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_generation_config(folder, ids)
        for name, group in files.items():
            if is_complete(folder / name, group):
                advance(sum(tensor.nbytes for tensor in group))
            else:
                write_file(folder / name, group, tensors.read, advance)
        if len(files) > 1:
            (folder / INDEX).write_text(json.dumps(index_of(files), indent=2) + "\n")
    return Converted(
        path=options.output,
        checkpoint=source.path,
        architecture=architecture.class_name,
        dtype=dtype,
        parameters=total // dtype.itemsize,
        nbytes=total,
        files=len(files),
        notes=notes,
    )


def check(options: ToHf) -> ToHf:
    """Raises ConvertError for what `convert_to_hf` would refuse at its start. Writes nothing to the output.

    Returns the options with the path of the tokenizer in place of its name on the hub, which so is asked once.
    """
    source = open_checkpoint(options.checkpoint)
    tokenizer = _tokenizer(source, options)
    check_target(options.output, options.overwrite, _inputs(source, tokenizer), foreign_to_export)
    if tokenizer is not None:
        with TemporaryDirectory() as folder:
            architecture, _ = _architecture(source, tokenizer)
            write_tokenizer(tokenizer, source.vocab_size, Path(folder), architecture.model_type)
    return replace(options, tokenizer=None if tokenizer is None else str(tokenizer))


def foreign_to_export(folder: Path) -> str | None:
    """The first entry of a folder that no export wrote: a README.md or a .git as well, which are somebody's work, and
    the config.json of another model."""
    entries = sorted(folder.iterdir())
    for path in entries:
        if path.is_dir():
            ours = path.name == TEMPLATES and all(inner.suffix == ".jinja" for inner in path.iterdir())
        else:
            ours = path.name in _WRITTEN or _WEIGHTS.fullmatch(path.name) is not None
        if not ours:
            return path.name
    config = read_json(folder / "config.json")
    if config.get("hidden_act") == "relu" and "transformers_version" not in config:  # as transformers itself writes
        return None
    return "config.json" if folder / "config.json" in entries else entries[0].name


class _Tensors:
    """The tensors of the export, made when they are asked for; those of one weight come from one read."""

    def __init__(self, source: Source, dtype: torch.dtype, architecture: Architecture) -> None:
        self._source, self._dtype = source, dtype
        self._parts: dict[str, tuple[Weight, int]] = {}
        self._current: tuple[Weight, list[Tensor]] | None = None
        self.planned: list[Planned] = []
        for weight in source.weights:
            shapes = hf_shapes(weight, source.model, source.vocab_size)
            for index, (name, shape) in enumerate(zip(weight.names, shapes, strict=True)):
                self._parts[name] = (weight, index)
                self.planned.append(Planned(name, shape, dtype))
        self._zeros = zero_tensors(source.model, architecture)
        self.planned += [Planned(name, shape, dtype) for name, shape in self._zeros.items()]

    def read(self, name: str) -> Tensor:
        if name in self._zeros:
            return torch.zeros(self._zeros[name], dtype=self._dtype)
        weight, index = self._parts[name]
        if self._current is None or self._current[0] is not weight:
            self._current = None  # frees the one before first
            tensor = to_dtype(self._source.reader.read(weight), self._dtype, self._source.path, weight)
            self._current = (weight, split(weight, tensor, self._source.model, self._source.vocab_size))
        return self._current[1][index]


def _fingerprint(source: Source, options: ToHf, dtype: torch.dtype, tokenizer: Path | None) -> dict[str, Any]:
    metadata = (source.path / ".metadata").stat()
    return {
        "checkpoint": str(source.path.resolve()),
        "saved": [metadata.st_mtime_ns, metadata.st_size],
        "dtype": str(dtype),
        "shard_bytes": options.shard_bytes,
        "tokenizer": None if tokenizer is None else str(tokenizer),
    }


def _tokenizer(source: Source, options: ToHf) -> Path | None:
    name = None if options.no_tokenizer else options.tokenizer or source.tokenizer
    return None if name is None else find_tokenizer(name)


def _architecture(source: Source, tokenizer: Path | None) -> tuple[Architecture, bool]:
    """That of the export, and whether the tokenizer has it take the place of Qwen2. Raises ConvertError for none."""
    architecture = architecture_of(source.model)
    if architecture.model_type != "qwen2" or tokenizer is None or suits_qwen2(tokenizer):
        return architecture, False
    return architecture_of(source.model, qwen2_tokenizer=False), True


def _inputs(source: Source, tokenizer: Path | None) -> tuple[Path, ...]:
    return (source.path,) if tokenizer is None else (source.path, tokenizer)
