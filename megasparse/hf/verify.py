"""Run a Megatron checkpoint and a Hugging Face model on the same tokens and compare them block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megasparse.config import Config, parse_config
from megasparse.hf.errors import ConvertError
from megasparse.hf.hashes import hash_of_list, hash_tensors
from megasparse.hf.load import load_transformers
from megasparse.hf.model_folder import ModelFolder
from megasparse.hf.source import Source, open_checkpoint

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that rounding in fp32 explains in deep models.

A wrong permutation, a missing bias or another epsilon shows as 1e-2 and more."""


@dataclass(frozen=True)
class Comparison:
    """What the two models differ in. Outputs: largest absolute differences over all tokens and channels, in fp32."""

    tensors: int
    """How many the models have."""
    different: list[str]
    """Names of those that are not equal bit by bit."""
    sha256: str
    """Of the hash list of the checkpoint's tensors (`hashes.py`)."""
    embedding: float
    blocks: list[float]
    logits: float
    largest_logit: float
    same_top: int
    """Tokens whose largest logit is of the same word."""
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether the two are the same model and compute the same."""
        return not self.different and self.logits <= TOLERANCE * max(1.0, self.largest_logit)


def compare(
    checkpoint: Path,
    folder: Path,
    rounded: torch.dtype | None = None,
    tokens: int = 4096,
    down_by_neuron: bool | None = None,
) -> Comparison:
    """Compare all tensors, then load `checkpoint` with Megatron and `folder` with transformers, both in fp32, and run
    the same random tokens through them.

    Args:
        checkpoint: of megasparse, saved at any layout.
        folder: a Hugging Face model; its activation is taken to be ReLU.
        rounded: the type that one was converted to from the other; both are rounded to it first.
        tokens: how many, in sequences of at most 128.
        down_by_neuron: as in `ModelFolder`.

    Raises:
        ConvertError: a model cannot be read, or memory is too small.
    """
    source = open_checkpoint(checkpoint)
    length = min(128, source.max_position_embeddings)
    rows = max(1, math.ceil(tokens / length))
    _check_memory(source, rows * length)
    ours_hashes = list(hash_tensors(checkpoint, rounded))
    theirs_hashes = {item.name: item for item in hash_tensors(folder, rounded, down_by_neuron)}
    inputs = torch.randint(source.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            theirs = _run_transformers(ModelFolder(folder, down_by_neuron), inputs, rounded)
            ours = _run_megatron(source, inputs, rounded)
    except torch.OutOfMemoryError:
        raise ConvertError(
            "--verify: the GPU's memory is too small for the model in fp32; verify on the CPU with "
            "CUDA_VISIBLE_DEVICES= in front of the command"
        ) from None
    differences = [_largest(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True)]
    return Comparison(
        tensors=len(ours_hashes),
        different=[item.name for item in ours_hashes if theirs_hashes.get(item.name) != item],
        sha256=hash_of_list(ours_hashes),
        embedding=differences[0],
        blocks=differences[1:],
        logits=_largest(ours[-1], theirs[-1]),
        largest_logit=float(ours[-1].abs().max()),
        same_top=int((ours[-1].argmax(-1) == theirs[-1].argmax(-1)).sum()),
        tokens=inputs.numel(),
    )


def _check_memory(source: Source, tokens: int) -> None:
    """Raises ConvertError where two copies of the model in fp32 and the outputs of both do not fit."""
    parameters = sum(weight.count for weight in source.weights)
    outputs = tokens * ((source.model.num_layers + 1) * source.model.hidden_size + 2 * source.vocab_size)
    needed, free = 4 * (2 * parameters + 2 * outputs), psutil.virtual_memory().available
    if needed > free:
        raise ConvertError(
            f"--verify needs {needed / 2**30:.1f} GiB of memory (the model twice, in fp32, and its outputs) and "
            f"{free / 2**30:.1f} GiB are available; run it on a larger machine, with a smaller --verify-tokens, or "
            "compare the output of `megasparse convert hashes` for both, which needs little memory"
        )


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _run_megatron(source: Source, inputs: Tensor, rounded: torch.dtype | None) -> list[Tensor]:
    """Outputs [b, s, ...] of the embedding and of every block, and the logits."""
    from megatron.core import dist_checkpointing

    from megasparse.megatron.model import build_model

    with _single_process():
        (model,) = build_model(_config(source))
        # The formats that training saves in.
        sharded = model.sharded_state_dict(prefix="", metadata={"singleton_local_shards": False})
        model.load_state_dict(dist_checkpointing.load({"model": sharded}, str(source.path))["model"])
        device = next(model.parameters()).device
        _round(model, rounded)
        model.eval()
        blocks: Any = model.decoder.layers

        def run(tokens: Tensor) -> list[Tensor]:
            outputs: list[Tensor] = []
            hooks = _record(model.embedding, blocks, outputs, lambda tensor: tensor.transpose(0, 1))
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            logits = model(tokens.to(device), positions.to(device), None)
            for hook in hooks:
                hook.remove()
            return [*outputs, logits[..., : source.vocab_size].float().cpu()]

        return _in_batches(run, inputs)


def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def _in_batches(run: Callable[[Tensor], list[Tensor]], inputs: Tensor, rows: int = 8) -> list[Tensor]:
    """`run` over some sequences at a time, its outputs put together again."""
    parts = [run(batch) for batch in inputs.split(rows)]
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def _config(source: Source) -> Config:
    """The model alone, in fp32 on one process."""
    model = source.model.model_dump(mode="json")
    return parse_config(
        {
            "model": {**model, "implementation": "local", "max_position_embeddings": source.max_position_embeddings},
            "data": {"sequence_length": source.max_position_embeddings},
            "sparsity": {"path": "dense"},
            "training": {"global_batch_size": 1, "steps": 1, "precision": "fp32"},
        },
        source=str(source.path),
    )


@contextmanager
def _single_process() -> Iterator[None]:
    """Megatron's process groups for a job of this process alone."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    if dist.is_initialized():
        raise RuntimeError("a process group exists already; verify in a process of its own")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _run_transformers(folder: ModelFolder, inputs: Tensor, rounded: torch.dtype | None) -> list[Tensor]:
    model = load_transformers(folder, torch.float32, activation="relu")
    _round(model, rounded)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model.to(device)

    def run(tokens: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        hooks = _record(model.model.embed_tokens, model.model.layers, outputs, lambda tensor: tensor)
        logits = model(tokens.to(device)).logits
        for hook in hooks:
            hook.remove()
        return [*outputs, logits.float().cpu()]

    return _in_batches(run, inputs)


def _record(
    embedding: torch.nn.Module, blocks: Any, outputs: list[Tensor], arrange: Callable[[Tensor], Tensor]
) -> list[Any]:
    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        outputs.append(arrange(tensor).float().cpu())

    return [module.register_forward_hook(keep) for module in (embedding, *blocks)]
