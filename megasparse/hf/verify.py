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
from megasparse.hf.config import read_hf_config, to_hf_config
from megasparse.hf.errors import ConvertError
from megasparse.hf.safetensors_files import WeightFiles
from megasparse.hf.source import Source, open_checkpoint

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that rounding in fp32 explains in deep models.

A wrong permutation, a missing bias or another epsilon shows as 1e-2 and more."""


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences, over all tokens and channels, of the outputs in fp32."""

    embedding: float
    blocks: list[float]
    logits: float
    largest_logit: float
    same_top: float
    """Fraction of tokens whose largest logit is of the same word."""
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether the two compute the same."""
        return self.logits <= TOLERANCE * max(1.0, self.largest_logit)


def check_memory(parameters: int) -> None:
    """Raises ConvertError where two copies of the model in fp32 do not fit."""
    needed, free = 2 * 4 * parameters, psutil.virtual_memory().available
    if needed > free:
        raise ConvertError(
            f"--verify needs {needed / 2**30:.1f} GiB of memory (the model twice, in fp32) and {free / 2**30:.1f} "
            "GiB are "
            "available; run it on a larger machine or leave out --verify"
        )


def compare(checkpoint: Path, folder: Path, rounded: torch.dtype | None = None, tokens: int = 512) -> Comparison:
    """Load `checkpoint` with Megatron and `folder` with transformers, both in fp32, and run random tokens.

    Args:
        checkpoint: of megasparse, saved at any layout.
        folder: a Hugging Face model; its activation is taken to be ReLU.
        rounded: round Megatron's weights to this type first, where the model was exported in it.
        tokens: how many, in sequences of at most 128.
    """
    source = open_checkpoint(checkpoint)
    length = min(128, source.max_position_embeddings)
    rows = max(1, math.ceil(tokens / length))
    inputs = torch.randint(source.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = _run_transformers(folder, inputs)
        ours = _run_megatron(source, inputs, rounded)
    differences = [_largest(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True)]
    return Comparison(
        embedding=differences[0],
        blocks=differences[1:],
        logits=_largest(ours[-1], theirs[-1]),
        largest_logit=float(ours[-1].abs().max()),
        same_top=float((ours[-1].argmax(-1) == theirs[-1].argmax(-1)).double().mean()),
        tokens=inputs.numel(),
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
        if rounded is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(rounded))
        model.eval()
        outputs: list[Tensor] = []
        blocks: Any = model.decoder.layers
        hooks = _record(model.embedding, blocks, outputs, lambda tensor: tensor.transpose(0, 1))
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        logits = model(inputs.to(device), positions.to(device), None)
        for hook in hooks:
            hook.remove()
    return [*outputs, logits[..., : source.vocab_size].float().cpu()]


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


def _run_transformers(folder: Path, inputs: Tensor) -> list[Tensor]:
    model = _reference(folder)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model.to(device).eval()
    outputs: list[Tensor] = []
    hooks = _record(model.model.embed_tokens, model.model.layers, outputs, lambda tensor: tensor)
    logits = model(inputs.to(device)).logits
    for hook in hooks:
        hook.remove()
    return [*outputs, logits.float().cpu()]


def _reference(folder: Path) -> Any:
    """The model in transformers, in fp32: as it loads by itself where its activation is ReLU, else made to be ReLU."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    described = read_hf_config(folder)
    stock = described.down_by_neuron is False and described.activation == "relu"
    if stock and not (folder / "config.json").read_text().count("sparsity_"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model = described.model
    assert model.vocab_size is not None
    raw = to_hf_config(model, model.vocab_size, described.max_position_embeddings, "float32", {})
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    files = WeightFiles(folder)
    for name, parameter in built.named_parameters():
        if name not in files.files:  # a tied output layer, or a bias that is zero in the model and absent in the file
            parameter.data.zero_() if name.endswith(".bias") else None
            continue
        tensor = files.read(name).float()
        parameter.data.copy_(tensor if tensor.shape == parameter.shape else tensor.t())
    return built


def _record(
    embedding: torch.nn.Module, blocks: Any, outputs: list[Tensor], arrange: Callable[[Tensor], Tensor]
) -> list[Any]:
    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        outputs.append(arrange(tensor).float().cpu())

    return [module.register_forward_hook(keep) for module in (embedding, *blocks)]
