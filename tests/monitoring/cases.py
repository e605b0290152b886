"""What runs inside the worker processes: a tiny GPT trained by Megatron, observed, and counted the slow way beside."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megasparse.config import parse_config
from megasparse.megatron import build_model, iter_sparse_mlps
from megasparse.monitoring.monitor import Monitor
from megasparse.monitoring.record import read_records
from megasparse.training.callbacks import Metrics, TrainState
from megasparse.training.l1 import L1Controller
from tests.megatron.tiny_model import SEQUENCE, Model, make_config, start


@dataclass
class Seen:
    """One call of one MLP: which tokens and neurons this rank held, and what they did."""

    layer: int
    tensor_rank: int
    data_rank: int
    active: np.ndarray
    """bool [tokens, neurons of this rank]"""
    magnitude: np.ndarray
    """fp64 [tokens, neurons of this rank]: |h|"""
    counted: np.ndarray
    """bool [tokens]"""


@dataclass
class Witness:
    """Recomputes every hidden activation from a layer's input, by plain products, as the forward runs."""

    seen: list[Seen] = field(default_factory=list)

    def watch(self, mlp: Any) -> None:
        def forward(_module: Any, inputs: tuple[Any, ...], options: dict[str, Any], _output: Any) -> None:
            if not torch.is_grad_enabled():  # the first forward of a layer that is recomputed later
                return
            x = inputs[0].detach()
            if mlp.sequence_parallel:
                parts = [torch.empty_like(x) for _ in range(mlp.tp_group.size())]
                dist.all_gather(parts, x.contiguous(), group=mlp.tp_group)
                x = torch.cat(parts)
            padding = options.get("padding_mask")
            padding = padding if padding is not None else mlp.fallback_mask()
            if padding is not None and padding.shape[1] != x.shape[0]:  # a part of the sequence, as x was
                pieces = [torch.empty_like(padding.int()) for _ in range(mlp.tp_group.size())]
                dist.all_gather(pieces, padding.int().contiguous(), group=mlp.tp_group)
                padding = torch.cat(pieces, dim=1).bool()
            rows = x.reshape(-1, x.shape[-1])
            weight = mlp.linear_fc1.weight.detach()
            gate, up = (rows @ half.T for half in weight.chunk(2))
            counted = torch.ones(len(rows), dtype=torch.bool) if padding is None else ~padding.t().reshape(-1)
            self.seen.append(Seen(
                layer=mlp.layer_index,
                tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
                data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
                active=(gate > 0).numpy(),
                magnitude=(gate.relu() * up).abs().double().numpy(),
                counted=counted.numpy(),
            ))  # fmt: skip

        mlp.register_forward_hook(forward, with_kwargs=True)


def observed_run(
    config: dict[str, Any], directory: Path, steps: int, kill_neurons: int, masked: bool, coefficients: list[float]
) -> list[list[Seen]]:
    """Train for `steps` with a real Monitor writing to `directory`; what every step's MLPs did on this rank."""
    cfg = make_config(**config)
    logs = {"directory": str(directory), "interval": 1, "console": False, "report": False}
    cfg = cfg.model_copy(update={"logging": cfg.logging.model_copy(update=logs)})
    start(cfg)
    model = Model(cfg, coeff=coefficients)
    mlps = list(iter_sparse_mlps(model.chunks))
    witness = Witness()
    for mlp in mlps:
        with torch.no_grad():
            # The first neurons of each rank never fire: a gate row of zeros.
            mlp.linear_fc1.weight[:kill_neurons] = 0
        witness.watch(mlp)
    l1 = L1Controller(cfg)
    l1.coefficients = coefficients
    state = TrainState(
        cfg=cfg, model=model.ddp, optimizer=None, scheduler=None, l1=l1, mlps=mlps,
        is_writer=dist.get_rank() == 0, run_directory=directory,
    )  # fmt: skip
    monitor = Monitor()
    monitor.on_start(state)
    result = []
    for step in range(1, steps + 1):
        witness.seen = []
        monitor.on_step_start(state)
        loss = model.forward_backward(step, masked=masked)
        for mlp in mlps:
            mlp.recorder.end_step()
        state.step = step
        state.consumed_tokens += cfg.training.global_batch_size * SEQUENCE
        wait = 0.001 * (1 + dist.get_rank())
        times = {"perf/step_time_s": 0.5, "perf/data_wait_s": wait, "perf/own_time_s": wait}
        monitor.on_step_end(state, {"loss/lm": loss, **times})
        result.append(witness.seen)
    monitor.on_end(state)
    return result


HAND_TOKENS = [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [-1.0, -1.0]]
HAND_GATE = [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [-1.0, -2.0]]
HAND_CONFIG: dict[str, Any] = {
    "run": {"name": "hand"},
    "model": {
        "num_layers": 2, "hidden_size": 2, "ffn_hidden_size": 4, "num_attention_heads": 1, "vocab_size": 8,
        "make_vocab_size_divisible_by": 8,
    },
    "sparsity": {"path": "dense", "dead_window_steps": 10},
    "data": {"sequence_length": 4},
    "training": {"global_batch_size": 1, "steps": 30, "precision": "fp32"},
}  # fmt: skip


class Wattmeter:
    """Stands for `EnergyMeter`, as no CPU has one: what a test says was drawn since the last `read`."""

    available = True
    drawn = 0.0

    def read(self) -> float:
        joules, self.drawn = self.drawn, 0.0
        return joules


def hand_run(
    directory: Path, first: int, last: int, run_id: str | None, attempt: int, wandb_mode: str,
    skipped: int | None = None, joules: tuple[float, float] | None = None,
) -> Any:  # fmt: skip
    """One process of a run of two real layers with weights, tokens and mask written down above.

    `skipped`: a step without an update. `joules`: drawn in a step and in a validation.

    Layer 0: the last token is padding. Gates before ReLU of the others: (1 0 -1 -1), (0 1 -1 -2), (2 1 -3 -4); the up
    product of each neuron is the sum of the token: 1, 1, 3. Layer 1 has a gate of zeros.
    """
    logs = {
        "directory": str(directory), "interval": 10, "console": False, "memory_interval": 20,
        "wandb": {"mode": wandb_mode, "project": "tests"},
    }  # fmt: skip
    cfg = parse_config(HAND_CONFIG | {"logging": logs})
    start(cfg)
    mlps = list(iter_sparse_mlps(build_model(cfg)))
    with torch.no_grad():
        for mlp in mlps:
            mlp.linear_fc1.weight.copy_(torch.tensor([*HAND_GATE, *[[1.0, 1.0]] * 4]))
        mlps[1].linear_fc1.weight[:4] = 0
    l1 = L1Controller(cfg)
    l1.coefficients = [0.3, 0.6]
    state = TrainState(
        cfg=cfg, model=[], optimizer=None, scheduler=None, l1=l1, mlps=mlps, is_writer=True, run_directory=directory,
        step=first - 1, consumed_tokens=3 * (first - 1), wandb_run_id=run_id, parameters=123,
    )  # fmt: skip
    monitor = Monitor()
    monitor.on_start(state)
    meter = Wattmeter()
    if joules is not None:
        monitor._energy = meter  # type: ignore[assignment]
    x = torch.tensor(HAND_TOKENS).unsqueeze(1).requires_grad_()
    padding = torch.tensor([[False, False, False, True]])
    for step in range(first, last + 1):
        monitor.on_step_start(state)
        for mlp in mlps:
            y, _ = mlp(x, padding_mask=padding)
            y.sum().backward()
            if step == skipped:
                mlp.recorder.forget_step()
            else:
                mlp.recorder.end_step()
        state.skipped_steps += step == skipped
        meter.drawn += joules[0] if joules else 0.0
        state.step, state.consumed_tokens = step, 3 * step
        metrics: Metrics = {
            "loss/lm": 6.0 / step, "lr": 1e-3 * step, "grad_norm": 0.5, "l1/coeff": 0.45, "l1/layer_0/coeff": 0.3,
            "l1/layer_1/coeff": 0.6, "progress/tokens": state.consumed_tokens, "perf/step_time_s": 0.25,
            "perf/data_wait_s": 0.01, "perf/own_time_s": 0.2, "optim/attempt": attempt,
        }  # fmt: skip
        if step in (4, 7):
            metrics |= {"dead_neurons/layer_0/reinitialised": 0, "dead_neurons/layer_1/reinitialised": step}
        monitor.on_step_end(state, metrics)
        if step % 15 == 0:
            meter.drawn += joules[1] if joules else 0.0
            monitor.on_eval(state, {"eval/loss": 3.0, "eval/ppl": 20.0, "eval/layer_0/l0": 1.5})
    monitor.on_end(state)
    return state.wandb_run_id


def cost_run(directory: Path, steps: int) -> list[float]:
    """Train a GPT of the quickstart's width with every sink on; perf/monitor_share of each record."""
    cfg = make_config(
        model__hidden_size=128, model__ffn_hidden_size=512, training__micro_batch_size=32,
        training__global_batch_size=64, training__steps=steps,
    )  # fmt: skip
    wandb = cfg.logging.wandb.model_copy(update={"mode": "offline"})
    logs = {"directory": str(directory), "console": False, "report": False, "wandb": wandb}
    cfg = cfg.model_copy(update={"logging": cfg.logging.model_copy(update=logs)})
    start(cfg)
    model = Model(cfg, coeff=1e-3)
    mlps = list(iter_sparse_mlps(model.chunks))
    state = TrainState(
        cfg=cfg, model=model.ddp, optimizer=None, scheduler=None, l1=L1Controller(cfg), mlps=mlps,
        is_writer=True, run_directory=directory,
    )  # fmt: skip
    monitor = Monitor()
    monitor.on_start(state)
    for step in range(1, steps + 1):
        monitor.on_step_start(state)
        started = time.perf_counter()
        loss = model.forward_backward(step)
        for mlp in mlps:
            mlp.recorder.end_step()
        state.step = step
        seconds = time.perf_counter() - started
        monitor.on_step_end(
            state, {"loss/lm": loss, "perf/step_time_s": seconds, "perf/own_time_s": seconds, "perf/data_wait_s": 0.0}
        )
    monitor.on_end(state)
    records = read_records(directory / "metrics.jsonl")
    return [float(record.metrics["perf/monitor_share"] or 0) for record in records]
