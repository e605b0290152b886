"""Tiny models in both formats, and what runs inside the worker processes of these tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

SEQUENCE = 24
VOCABULARY = 60
SCALING = {
    "type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "llama-untied-gqa-scaled": {
        "tie_embeddings": False, "num_query_groups": 2, "rope_scaling": SCALING, "norm_epsilon": 3e-3,
        "rotary_base": 5e5,
    },
    "llama-wide-heads": {"num_query_groups": 2, "kv_channels": 16, "vocab_size": 64},
    "qwen2": {"qkv_bias": True, "num_query_groups": 2, "tie_embeddings": False},
    "qwen3": {"qk_norm": True, "num_query_groups": 2, "kv_channels": 16},
    "qwen3-bias": {"qk_norm": True, "qkv_bias": True},
    "arcee": {"gated": False, "num_query_groups": 2},
    "arcee-bias": {"gated": False, "qkv_bias": True, "tie_embeddings": False, "rope_scaling": SCALING},
    "apertus": {"gated": False, "qk_norm": True, "num_query_groups": 2},
}  # fmt: skip
"""Models of every architecture, with everything that a conversion can get wrong, by the keys of `model`."""

ARCHITECTURES = {
    "llama-tied": "LlamaForCausalLM", "llama-untied-gqa-scaled": "LlamaForCausalLM",
    "llama-wide-heads": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3-bias": "Qwen3ForCausalLM", "arcee": "ArceeForCausalLM", "arcee-bias": "ArceeForCausalLM",
    "apertus": "ApertusForCausalLM",
}  # fmt: skip


def config_of(name: str, **parallel: int) -> dict[str, Any]:
    """The configuration of one of MODELS."""
    return {
        "model": {
            "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
            "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 16, "init_std": 0.1, **MODELS[name],
        },
        "data": {"sequence_length": SEQUENCE},
        "parallel": parallel,
        "training": {"global_batch_size": 4, "steps": 4, "precision": "fp32"},
    }  # fmt: skip


def inputs(vocabulary: int = VOCABULARY) -> torch.Tensor:
    """int64 [4, SEQUENCE] tokens."""
    return torch.randint(vocabulary, (4, SEQUENCE), generator=torch.Generator().manual_seed(3))


def _start(raw: dict[str, Any]) -> Any:
    """The model of a configuration on this rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megasparse.config import parse_config
    from megasparse.megatron import build_model

    cfg = parse_config(raw)
    parallel_state.initialize_model_parallel(cfg.parallel.tensor, cfg.parallel.pipeline)
    model_parallel_cuda_manual_seed(1)
    (model,) = build_model(cfg)
    return cfg, model.eval()


@torch.no_grad()
def _logits(model: Any, vocabulary: int) -> np.ndarray | None:
    """Logits [b, s, vocabulary] of `inputs`, on the ranks of the last stage."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens = inputs(vocabulary)
    positions = torch.arange(SEQUENCE).expand_as(tokens)
    if not parallel_state.is_pipeline_first_stage():
        received = torch.empty(SEQUENCE, tokens.shape[0], model.config.hidden_size)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    output = model(tokens, positions, None)
    if not parallel_state.is_pipeline_last_stage():
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    whole = gather_from_tensor_model_parallel_region(output)
    return whole[..., :vocabulary].float().numpy()


def save_all(folder: Path, names: list[str], parallel: dict[str, int]) -> dict[str, np.ndarray | None]:
    """Save models of MODELS, each as `folder/name`. Returns their logits."""
    from megatron.core import parallel_state

    found = {}
    for name in names:
        raw = config_of(name, **parallel)
        found[name] = save(raw, folder / name, raw["model"]["vocab_size"])
        parallel_state.destroy_model_parallel()
    return found


def save(raw: dict[str, Any], path: Path, vocabulary: int, bf16: bool = False) -> np.ndarray | None:
    """Save a checkpoint as training does; every parameter has random values. Returns the logits."""
    from megatron.core import parallel_state

    from megasparse.megatron.init import global_name

    cfg, model = _start(raw)
    first = model.decoder.layers[0].layer_number - 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms are ones and biases zeros at first
                whole = parameter.numel() * (cfg.parallel.tensor if name.endswith("linear_qkv.bias") else 1)
                seed = sum(map(ord, global_name(name, first, cfg.model.tie_embeddings))) + 1000 * whole
                noise = 0.3 * torch.randn(whole, generator=torch.Generator().manual_seed(seed))
                if whole != parameter.numel():
                    noise = noise.chunk(cfg.parallel.tensor)[parallel_state.get_tensor_model_parallel_rank()]
                parameter.add_(noise)
    logits = _logits(model, vocabulary)
    if bf16:
        model.bfloat16()
    _write(cfg, model, path)
    return logits


def _write(cfg: Any, model: Any, path: Path) -> None:
    """A checkpoint of the model at its layout, in the formats that training saves."""
    from megatron.core import dist_checkpointing

    from megasparse.training.checkpoint_files import seal
    from megasparse.training.save_helper import start_save_helper

    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    state = {
        "model": model.sharded_state_dict(prefix="", metadata={"singleton_local_shards": False}),
        "run": {"step": 7, "config": cfg.model_dump(mode="json")},
    }
    start_save_helper()
    dist_checkpointing.save(state, str(path))
    if dist.get_rank() == 0:
        seal(path, 7)
    dist.barrier()


def load(raw: dict[str, Any], path: Path, vocabulary: int) -> np.ndarray | None:
    """Logits after loading a checkpoint as `checkpoint.load` does. It is saved again beside it, as `saved-again`."""
    from megasparse.training.checkpoint import Checkpointer

    cfg, model = _start(raw)
    Checkpointer(cfg).load_weights(path, [model], None)
    _write(cfg, model, path.parent / "saved-again")
    return _logits(model, vocabulary)


def load_all(cases: list[tuple[str, Path, int]]) -> dict[str, np.ndarray | None]:
    """`load` at TP 2 x PP 2 for (name of MODELS, checkpoint, vocabulary) each."""
    from megatron.core import parallel_state

    found = {}
    for name, path, vocabulary in cases:
        raw = config_of(name, tensor=2, pipeline=2)
        raw["checkpoint"] = {"directory": str(path.parent / "new")}
        found[name] = load(raw, path, vocabulary)
        parallel_state.destroy_model_parallel()
    return found


def verify(checkpoint: Path, folder: Path) -> Any:
    """`compare` in a process without a process group."""
    from megasparse.hf.verify import compare

    dist.destroy_process_group()
    return compare(checkpoint, folder, tokens=4096)


def write_plain(
    path: Path,
    raw: dict[str, Any],
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    make: Callable[[Any], torch.Tensor] | None = None,
) -> Path:
    """A checkpoint of a configuration, written without Megatron; its weights are random, or made by `make`."""
    from megasparse.config import parse_config
    from megasparse.hf.architectures import architecture_of
    from megasparse.hf.megatron_files import write_checkpoint
    from megasparse.hf.tensors import weights
    from megasparse.training.checkpoint_files import seal

    cfg = parse_config(raw)
    listed = weights(cfg.model, architecture_of(cfg.model), cfg.padded_vocab_size(1))
    path.mkdir(parents=True)
    common = {"run": {"step": 0, "config": cfg.model_dump(mode="json")}}
    generator = torch.Generator().manual_seed(0)
    write_checkpoint(
        path,
        listed,
        cfg.model.num_layers,
        dtype,
        common,
        make or (lambda weight: scale * torch.randn(weight.shape, generator=generator, dtype=dtype)),
        lambda count: None,
    )
    seal(path, 0)
    return path


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file of a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def megasparse(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-W", "ignore", "-m", "megasparse", *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
