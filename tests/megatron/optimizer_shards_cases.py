"""What runs inside the worker processes of `test_optimizer_shards`: checkpoints written and read in both ways."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

from megasparse.megatron.optimizer_shards import STATES, OwnShards, save_own_shards
from megasparse.training.save_helper import start_save_helper
from tests.megatron.cases import _optimizer, _state
from tests.megatron.tiny_model import Model, make_config, start

WAYS = ("megatron", "pieces")
"""Who reads or writes: Megatron's own methods, or ours."""


def _choose(optimizer: Any, way: str) -> None:
    for name in ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"):
        vars(optimizer).pop(name, None)
    if way == "pieces":
        save_own_shards(optimizer)


def _start(config: dict[str, Any], model: dict[str, Any]) -> tuple[Model, Any]:
    cfg = make_config(parallel__distributed_optimizer=True, training__global_batch_size=6, **config)
    start(cfg)
    tiny = Model(cfg, **model)
    optimizer = _optimizer(tiny)
    [only] = getattr(optimizer, "chained_optimizers", [optimizer])
    return tiny, only


def save(config: dict[str, Any], model: dict[str, Any], folder: str) -> tuple[int, int, bool]:
    """Trains two steps and saves them in both ways. Returns `_sizes` of ours."""
    tiny, optimizer = _start(config, model)
    for step in range(2):
        optimizer.zero_grad()
        tiny.forward_backward(step)
        optimizer.step()
    for way in WAYS:
        _choose(optimizer, way)
        path = Path(folder) / way
        if torch.distributed.get_rank() == 0:
            path.mkdir()
        torch.distributed.barrier()
        state = _state(tiny, optimizer, loading=False)
        if way == "pieces":
            sizes = _sizes(optimizer, state)
        strategy: Any = get_default_save_sharded_strategy("torch_dist")
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() > 1:
            strategy = FullyParallelSaveStrategyWrapper(strategy, group)
        start_save_helper()
        dist_checkpointing.save(state, str(path), strategy)
    return sizes


def _sizes(optimizer: Any, state: dict[str, Any]) -> tuple[int, int, bool]:
    """Elements of this rank's shares, of its pieces, and whether these, where they have data, are views of those."""
    own = [tensor for shares in OwnShards(optimizer).states() for tensor in shares.values()]
    memory = {tensor.untyped_storage().data_ptr() for tensor in own}
    pieces = list(nested_values(state["optimizer"]["param_state"]))
    return (
        sum(tensor.numel() for tensor in own),
        sum(prod(piece.local_shape) for piece in pieces),
        all(piece.data is None or piece.data.untyped_storage().data_ptr() in memory for piece in pieces),
    )


def load(config: dict[str, Any], model: dict[str, Any], folder: str) -> list[str]:
    """Loads each checkpoint of `save` in each way. Returns what differs from Megatron's own of its own."""
    tiny, optimizer = _start(config, model)
    wanted: list[dict[str, torch.Tensor]] = []
    problems: list[str] = []
    for written in WAYS:
        for way in WAYS:
            with torch.no_grad():
                for state in OwnShards(optimizer).states():
                    for tensor in state.values():
                        tensor.fill_(float("nan"))
            _choose(optimizer, way)
            problems += _load(tiny, optimizer, Path(folder) / written, way)
            shares = OwnShards(optimizer).states()
            found = [{name: tensor.clone() for name, tensor in state.items()} for state in shares]
            wanted = wanted or found
            for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
                problems += [
                    f"{written} read by {way}: {name} of parameter {number}"
                    for name in STATES
                    if not torch.equal(ours[name], theirs[name])
                ]
    return problems


def _load(tiny: Model, optimizer: Any, path: Path, way: str) -> list[str]:
    """Loads the optimizer. Returns what is more than this rank's own, where it is done in pieces."""
    state = {"optimizer": _state(tiny, optimizer, loading=True)["optimizer"]}
    problems = []
    if way == "pieces":
        own, asked, views = _sizes(optimizer, state)
        problems = [] if own == asked and views else [f"a rank asks for {asked} elements, its own are {own}"]
        for index, pieces in state["optimizer"]["param_state"].items():
            # In fp32, which this is, the master weight is the weight too: see `_share_memory`.
            apart = {name: all(piece.data is None for piece in pieces[name].values()) for name in STATES}
            if apart != {"param": True, "exp_avg": False, "exp_avg_sq": False}:
                problems.append(f"parameter {index} is not loaded in place but for its master weight: {apart}")
    strategy: Any = get_default_load_sharded_strategy(str(path))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    with mock.patch.object(torch.distributed, "broadcast", wraps=torch.distributed.broadcast) as broadcast:
        loaded = dist_checkpointing.load(state, str(path), strategy)
    optimizer.load_state_dict(loaded["optimizer"])
    if way == "pieces":
        problems += [f"ranks exchange a tensor {list(call.args[0].shape)}" for call in broadcast.call_args_list]
    return problems
