"""One optimizer step: forward and backward of all micro-batches, the reduced loss, the update.

Losses are sums over counted tokens (`calculate_per_token_loss`): Megatron divides the gradient by the number of
counted tokens of the global batch, once. The mean is then exact whatever the layout, the micro-batches and the masks,
and the L1 term, which the sparse MLPs add to the graph as sums too, keeps its weight.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.profiler import record_function

from megasparse.config import Config
from megasparse.monitoring.breakdown import GRADIENTS, OPTIMIZER
from megasparse.training.data import MicroBatch
from megasparse.training.gradients import finish_gradients
from megasparse.training.optimizer import clip_gradients, ddp_config, gradient_norm
from megasparse.training.own_time import OwnTime
from megasparse.training.signals import StopReason


class NotFiniteError(RuntimeError):
    """Loss or gradient was not finite for too many steps in a row, or in all."""


class StepResult(NamedTuple):
    """The same on every rank, but for the last."""

    loss: float
    """Mean cross entropy per counted token of the global batch, nats."""
    tokens: int
    """Counted tokens of the global batch."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    updated: bool
    """False where loss or gradient was not finite: the parameters are as before."""
    not_finite_ranks: list[int]
    """Ranks (of the last pipeline stage) whose own loss was not finite."""
    stop: StopReason
    """Why to stop after this step, if at all."""
    gpu_wait_seconds: float
    """How long this rank's host, done with launching the backward, waited for its GPU. Near zero: the GPU may wait
    for the host."""


def connect_schedule(model: Sequence[torch.nn.Module], own_time: OwnTime) -> None:
    """Tells Megatron's pipeline schedules how gradients of these DDP-wrapped chunks are finished and overlapped.

    `own_time` stops where they are.
    """

    def finish(*arguments: Any, **options: Any) -> None:
        own_time.stop()
        finish_gradients(*arguments, **options)

    config: Any = model[0].config
    config.finalize_model_grads_func = finish
    if ddp_config(model).overlap_grad_reduce:
        single = len(model) == 1
        no_sync = [chunk.no_sync for chunk in model]
        start = [chunk.start_grad_sync for chunk in model]
        config.no_sync_func = no_sync[0] if single else no_sync
        config.grad_sync_func = start[0] if single else start


def token_loss(batch: MicroBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of the last stage, fp32 [b, s] -> (their sum over counted tokens, the number of these, what to report)."""
    mask = batch.loss_mask
    total = torch.sum(losses.float() * mask)
    count = mask.sum().to(torch.int)
    return total, count, {"loss": total.detach(), "tokens": count.detach()}


def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Megatron's forward step of one micro-batch through one model chunk; masks go to every pipeline stage."""
    batch = next(batches)
    output = model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask(),
        labels=batch.labels,
        padding_mask=batch.padding_mask,
    )
    return output, partial(token_loss, batch)


def run_schedule(
    cfg: Config, model: Sequence[torch.nn.Module], batches: Sequence[MicroBatch], forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    """All micro-batches through Megatron's schedule; what `token_loss` reports, on the last stage alone."""
    chunks = list(model)
    many = len(chunks) > 1
    return list(
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks] if many else iter(batches),
            model=chunks if many else chunks[0],
            num_microbatches=len(batches),
            seq_length=cfg.data.sequence_length,
            micro_batch_size=cfg.training.micro_batch_size,
            forward_only=forward_only,
        )
        or []
    )


class ReducedLosses(NamedTuple):
    """Of all micro-batches of the job, the same on every rank."""

    total: float
    """Sum over counted tokens."""
    tokens: int
    """Counted tokens."""
    not_finite_ranks: list[int]
    stop: StopReason


def start_reduction(
    reports: Sequence[dict[str, torch.Tensor]], device: torch.device, stop: StopReason = StopReason.NONE
) -> torch.Tensor:
    """One all-reduce over the job, for `read_reduction`. It waits for no GPU.

    Every model replica counts once: its last stage reports, on the first tensor-parallel rank.
    """
    reasons = len(StopReason)
    row = torch.zeros(2 + reasons + dist.get_world_size(), dtype=torch.float64, device=device)
    row[2 + stop].fill_(1.0)  # `row[i] = 1.0` would copy the number from the host, and wait for all that is launched
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        loss = torch.stack([report["loss"].double() for report in reports]).sum()
        row[0] = loss
        row[1] = torch.stack([report["tokens"] for report in reports]).sum()
        row[2 + reasons + dist.get_rank()] = (~torch.isfinite(loss)).double()
    dist.all_reduce(row)
    return row


def read_reduction(row: torch.Tensor) -> ReducedLosses:
    """Waits for the GPU."""
    values, reasons = row.tolist(), len(StopReason)
    stops = [reason for reason in StopReason if values[2 + reason] > 0]
    bad = [rank for rank, value in enumerate(values[2 + reasons :]) if value > 0]
    return ReducedLosses(values[0], int(values[1]), bad, max(stops))


def train_step(
    cfg: Config,
    model: Sequence[torch.nn.Module],
    optimizer: Any,
    batches: Sequence[MicroBatch],
    stop: StopReason,
    after_backward: Callable[[], None] | None = None,
) -> StepResult:
    """Runs one step on every rank.

    Args:
        cfg: the run.
        model: DDP-wrapped chunks of this rank.
        optimizer: Megatron's optimizer.
        batches: this rank's micro-batches.
        stop: why this rank wants to stop.
        after_backward: called between the backward pass and the update.
    """
    with record_function(GRADIENTS):
        for chunk in model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        optimizer.zero_grad()
    reports = run_schedule(cfg, model, batches, forward_only=False)
    if after_backward is not None:
        after_backward()
    # The GPU is still in the backward: what follows is launched behind it, before the first number is waited for.
    row = start_reduction(reports, batches[0].tokens.device, stop)
    with record_function(OPTIMIZER):
        launched = time.perf_counter()
        norm = gradient_norm(optimizer)
        losses = read_reduction(row)
        waited = time.perf_counter() - launched
        loss = losses.total / losses.tokens if losses.tokens else 0.0
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            clip_gradients(optimizer, norm)
            optimizer.step_with_ready_grads()
    return StepResult(loss, losses.tokens, norm, finite, losses.not_finite_ranks, losses.stop, waited)
