"""What runs inside the worker processes of test_tensor_parallel: one SparseMLP, watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from megasparse.megatron import iter_sparse_mlps
from megasparse.mlp import steps
from tests.megatron.tiny_model import Model, make_config, start

SEQUENCE, BATCH = 256, 2


class _Recorded:
    """A collective under way, whose `wait` is recorded."""

    def __init__(self, work: Any, name: str, events: list[str]) -> None:
        self._work, self._name, self._events = work, name, events

    def wait(self) -> None:
        self._work.wait()
        self._events.append(f"{self._name} done")


@contextmanager
def recorded(events: list[str]) -> Iterator[None]:
    """Notes, in order, asynchronous collectives and the steps of the backward, all of which run as they are."""

    def collective(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            work = function(*args, **options)
            if not options.get("async_op"):
                return work
            events.append(f"{name} started")
            return _Recorded(work, name, events)

        return call

    def step(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            events.append(name)
            return result

        return call

    wrapped: list[tuple[Any, str, Any]] = []

    def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        wrapped.append((owner, name, getattr(owner, name)))
        setattr(owner, name, wrapper(name, getattr(owner, name)))

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        wrap(torch.distributed, name, collective)
    for name in ("input_gradient", "complete_input_gradient", "weight_gradients"):
        wrap(steps.BackwardSteps, name, step)
    try:
        yield
    finally:
        for owner, name, function in wrapped:
            setattr(owner, name, function)


def watch(config: dict[str, Any], capacity: int) -> dict[str, Any]:
    """Forward and backward of one MLP: the backward's events, the bytes saved for it, and what came out."""
    cfg = make_config(**config)
    start(cfg)
    mlp = next(iter_sparse_mlps(Model(cfg, coeff=1e-2).chunks))
    mlp.router.capacity = lambda _tokens: capacity  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SEQUENCE, BATCH, cfg.model.hidden_size, generator=generator)
    if cfg.parallel.sequence_parallel:
        x = x.chunk(cfg.parallel.tensor)[parallel_state.get_tensor_model_parallel_rank()].clone()
    x.requires_grad_()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = mlp(x)
    events: list[str] = []
    with recorded(events):
        output.square().sum().backward()
    assert x.grad is not None
    gradients = {name: parameter.main_grad.numpy().copy() for name, parameter in mlp.named_parameters()}
    return {
        "events": events,
        "saved": sum(saved.values()),
        "values": {"output": output.detach().numpy(), "input": x.grad.numpy(), **gradients},
    }
