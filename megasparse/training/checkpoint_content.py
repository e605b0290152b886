"""Parts of a checkpoint: where this rank's tensors lie in the whole, what is its own, what must not differ."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megasparse.config import Config
from megasparse.training.callbacks import TrainState
from megasparse.training.checkpoint_files import CheckpointError

RECORDER_SUMS = ("tokens", "active", "l1", "union", "tiles", "tile_counts")
"""Sums of `LayerStats`: routers and metrics go on as if nothing had happened."""

MODEL_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "gated",
    "vocab_size", "normalization", "qkv_bias", "qk_norm", "tie_embeddings",
)  # fmt: skip
"""Keys of `model` that must be the same when a checkpoint is loaded."""


def check_same_model(cfg: Config, saved: dict[str, Any], path: Path, optimizer: bool) -> None:
    """Compares the model of a checkpoint (its configuration) with that of the run.

    Raises:
        CheckpointError: they differ; the message names every key.
    """
    own = cfg.model_dump(mode="json")
    own, saved = ({**whole, "model": _sizes_written_out(whole["model"])} for whole in (own, saved))
    keys = [("model", key) for key in MODEL_KEYS]
    if optimizer:
        keys += [("parallel", "distributed_optimizer"), ("training", "precision")]
    different = [
        f"{section}.{key}: {saved[section].get(key)} there, {own[section][key]} here"
        for section, key in keys
        if saved[section].get(key) != own[section][key]
    ]
    if optimizer and _exempts(own) != _exempts(saved):
        there, here = (whole["optimizer"]["weight_decay_exclude"] for whole in (saved, own))
        different.append(f"optimizer.weight_decay_exclude: {there} there, {here} here: one of them exempts nothing")
    if different:
        raise CheckpointError(
            f"{path} is of another run:\n  " + "\n  ".join(different) + "\nGo on with the configuration it was saved "
            "with, or choose another checkpoint.directory."
        )


def _exempts(whole: dict[str, Any]) -> bool:
    """Whether parameters without weight decay have a group of their own in the optimizer's state."""
    there_are = {"norm", "embedding"} | ({"bias"} if whole["model"]["qkv_bias"] else set())
    return not there_are.isdisjoint(whole["optimizer"]["weight_decay_exclude"])


def changed_settings(
    cfg: Config,
    saved: dict[str, Any],
    sections: Sequence[str] = ("model", "sparsity", "parallel", "data", "training", "optimizer"),
) -> list[str]:
    """Every key of these sections that is not what it was in the configuration of a checkpoint."""
    own = cfg.model_dump(mode="json")
    return [change for section in sections for change in _changes(own[section], saved[section], section)]


def _changes(own: dict[str, Any], before: dict[str, Any], prefix: str) -> Iterator[str]:
    for name in (name for name in own if name in before):
        key, value, old = f"{prefix}.{name}", own[name], before[name]
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _changes(value, old, key)
        elif value != old:
            yield f"{key}: {old} -> {value}"


def _sizes_written_out(model: dict[str, Any]) -> dict[str, Any]:
    """None for a default size and that size are the same model."""
    heads = model["num_attention_heads"]
    return {
        **model,
        "num_query_groups": model["num_query_groups"] or heads,
        "kv_channels": model["kv_channels"] or model["hidden_size"] // heads,
    }


def layout(cfg: Config) -> dict[str, int]:
    """What must be equal for a rank to find its own state again."""
    return {
        "world": dist.get_world_size(),
        "tensor": cfg.parallel.tensor,
        "pipeline": cfg.parallel.pipeline,
        "virtual_pipeline": cfg.parallel.chunks,
        "context": cfg.parallel.context,
    }


def unwrapped(chunk: torch.nn.Module) -> Any:
    """The model inside DistributedDataParallel; checkpoints do not know of wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def neuron_shard(mlp: Any) -> ShardedTensor:
    """int32 [H]: steps since each neuron of a layer last fired, this tensor-parallel rank's part of it."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    return ShardedTensor.from_rank_offsets(
        f"neurons.{mlp.layer_index}.steps_since_fired",
        mlp.recorder.steps_since_fired,
        (0, rank, size),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def rank_object(data: Any) -> ShardedObject:
    """A value of this rank's own, found again by its place in the layout."""
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rank", data, shape, place, replica_id=0)


def get_rank_state(state: TrainState) -> dict[str, Any]:
    """Random states and routers, as plain values and tensors."""
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        "routers": {str(mlp.layer_index): mlp.router.state_dict() for mlp in state.mlps},
        "sums": {
            str(mlp.layer_index): {name: getattr(mlp.recorder, name).cpu() for name in RECORDER_SUMS}
            for mlp in state.mlps
        },
    }


def set_rank_state(saved: dict[str, Any], state: TrainState) -> None:
    """Counterpart of `get_rank_state`."""
    random.setstate(saved["python"])
    name, keys, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(saved["torch"])
    torch.cuda.set_rng_state(saved["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(saved["tracker"])
    for mlp in state.mlps:
        mlp.router.load_state_dict(saved["routers"][str(mlp.layer_index)])
        for name, value in saved["sums"][str(mlp.layer_index)].items():
            getattr(mlp.recorder, name).copy_(value)
