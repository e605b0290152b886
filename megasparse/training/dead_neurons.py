"""Re-initialisation of dead neurons: new gate rows for neurons that have not fired for a while.

Every `sparsity.reinit.every` steps, until `until_fraction` of the run, each neuron that fired for no counted token of
the whole job in the last `dead_window_steps` steps gets a new row in the gate matrix (in the up matrix where there is
no gate). Adam's moments of the row are zeroed and the fp32 master weights replaced, also under the distributed
optimizer, which holds a flat range of each parameter.

A row of independent normal numbers fires for half of all tokens. Some hundreds of such rows in a layer whose neurons
fire for one token in a hundred multiply its L0 for tens of steps, and most die again on the way down. So the new rows
are normal(0, std) across the layer's mean input, and lean against it so far that they fire as often as the layer's
average neuron does.

The normal numbers are a function of (seed, step, layer, global neuron, column), computed by a counter-based generator,
and the mean input is that of the whole batch, so the rows are the same at any TP, PP and DP, but for rounding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megasparse.config import Config
from megasparse.megatron.input_moments import InputMoments
from megasparse.training.optimizer import adam_moments, main_parameter

_MASK = (1 << 64) - 1


def reinit_is_due(cfg: Config, step: int) -> bool:
    """Whether rows are re-initialised after step `step` (1 is the first)."""
    reinit = cfg.sparsity.reinit
    return bool(reinit.every) and step % reinit.every == 0 and step <= reinit.until_fraction * cfg.training.steps


@torch.no_grad()
def reinitialise(cfg: Config, mlps: Sequence[Any], optimizer: Any, step: int, l0: Sequence[float]) -> list[int]:
    """Gives dead neurons new rows. Collective. `watch_inputs` must have been called before the step.

    Args:
        cfg: the run.
        mlps: this rank's SparseMLP modules.
        optimizer: Megatron's optimizer.
        step: the step that has just ended.
        l0: active neurons per token of every global layer in that step.

    Returns:
        the number of re-initialised neurons of every global layer, on every rank.
    """
    counts = torch.zeros(cfg.model.num_layers, dtype=torch.int64, device=torch.cuda.current_device())
    share_idle_steps(mlps)
    inputs = take_inputs(mlps)
    std = cfg.sparsity.reinit.std or cfg.model.init_std
    for mlp, table in zip(mlps, inputs, strict=True):
        dead = mlp.recorder.steps_since_fired >= cfg.sparsity.dead_window_steps
        neurons = dead.nonzero().squeeze(1)
        counts[mlp.layer_index] = neurons.numel()
        if neurons.numel():
            first = parallel_state.get_tensor_model_parallel_rank() * dead.numel()
            width = mlp.linear_fc1.weight.shape[1]
            seed = stream_seed(cfg.training.seed, step, mlp.layer_index)
            mean, square = InputMoments.read(table)
            rate = l0[mlp.layer_index] / cfg.model.ffn_hidden_size
            rows = lean(normal_rows(seed, neurons + first, width) * std, std, mean, square, rate)
            _replace_rows(optimizer, mlp.linear_fc1.weight, neurons, rows)
        mlp.recorder.revive(dead)
    # Tensor-parallel ranks hold different neurons, pipeline ranks different layers, data-parallel ranks the same.
    dist.all_reduce(counts, group=parallel_state.get_model_parallel_group())
    return [int(value) for value in counts.tolist()]


def watch_inputs(mlps: Sequence[Any]) -> None:
    """From here on the layers count their inputs; `reinitialise` ends it."""
    for mlp in mlps:
        weight = mlp.linear_fc1.weight
        mlp.input_moments = InputMoments(weight.shape[1], weight.device)


def take_inputs(mlps: Sequence[Any]) -> list[torch.Tensor]:
    """`InputMoments.table` of each layer, over all tokens of the job. Collective."""
    tables = [mlp.input_moments.table for mlp in mlps]
    forget_inputs(mlps)
    return _over_replicas(tables, dist.ReduceOp.SUM)


def forget_inputs(mlps: Sequence[Any]) -> None:
    """Ends `watch_inputs`, where it was called."""
    for mlp in mlps:
        mlp.input_moments = None


def lean(rows: torch.Tensor, std: float, mean: torch.Tensor, square: float, rate: float) -> torch.Tensor:
    """Turns normal rows so that each fires for a share `rate` of the inputs.

    With m the mean input, S = E|x|^2 - |m|^2 and z the normal quantile of 1 - rate, a row n across m, leaning by -a
    along it, has pre-activations of mean -a |m| and, if the inputs scatter alike in all D directions, variance
    std^2 S + a^2 S / D. The wanted share fires where z^2 times this is a^2 |m|^2. A layer without a mean input that
    stands out of the scatter allows no such a; its rows lean by no more than their own length.

    Args:
        rows: fp32 [n, D], normal(0, std).
        mean, square: of the inputs: m, fp32 [D], and E|x|^2.
        rate: between 0 and 1.
    """
    length = float(mean.norm())
    scatter = max(square - length * length, 0.0)
    if length == 0.0:
        return rows
    width = rows.shape[1]
    quantile = max(0.0, statistics.NormalDist().inv_cdf(1.0 - min(max(rate, 1e-4), 0.5)))
    margin = length * length - quantile * quantile * scatter / width
    longest = std * math.sqrt(width)
    shift = min(longest, quantile * std * math.sqrt(scatter / margin)) if margin > 0.0 else longest
    direction = mean / length
    return rows - (rows @ direction + shift)[:, None] * direction


@torch.no_grad()
def share_idle_steps(mlps: Sequence[Any]) -> None:
    """A neuron is idle only while it fires on no data- or context-parallel rank: takes the minimum over them."""
    least = _over_replicas([mlp.recorder.steps_since_fired for mlp in mlps], dist.ReduceOp.MIN)
    for mlp, steps in zip(mlps, least, strict=True):
        mlp.recorder.steps_since_fired.copy_(steps)


def _over_replicas(tensors: list[torch.Tensor], operation: dist.ReduceOp.RedOpType) -> list[torch.Tensor]:
    """Tensors of one shape, each reduced over the ranks that hold the same neurons: in one collective."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if not tensors or group.size() == 1:
        return tensors
    table = torch.stack(tensors)
    dist.all_reduce(table, op=operation, group=group)
    return list(table)


def _replace_rows(optimizer: Any, weight: torch.nn.Parameter, neurons: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes fp32 rows [n, D] into rows `neurons` of a weight, its master copy and its (zeroed) moments."""
    weight[neurons] = rows.to(weight.dtype)
    main, start, end = main_parameter(optimizer, weight)
    if main is None:
        return
    width = weight.shape[1]
    position = (neurons[:, None] * width + torch.arange(width, device=weight.device)).reshape(-1) - start
    inside = (position >= 0) & (position < end - start)
    position = position[inside]
    # With fp32 training main and weight are the same memory, or a view of it; writing twice does no harm.
    main.view(-1)[position] = rows.reshape(-1)[inside].to(main.dtype)
    for moment in adam_moments(optimizer, main):
        moment.view(-1)[position] = 0.0


def stream_seed(seed: int, step: int, layer: int) -> int:
    """A 64-bit number for one (seed, step, layer)."""
    state = 0
    for value in (seed, step, layer):
        state = _mix(state ^ (value + 1))
    return state


def _mix(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014), after its increment."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def normal_rows(seed: int, neurons: torch.Tensor, width: int) -> torch.Tensor:
    """Standard normal fp32 [n, width]: entry (i, d) depends on (seed, neurons[i], d) alone.

    splitmix64 of a counter gives 64 random bits an entry, Box-Muller makes them normal.
    """
    columns = torch.arange(width, device=neurons.device, dtype=torch.int64)
    bits = _mix_tensor((neurons.to(torch.int64)[:, None] * width + columns) * 2 + _signed(seed))
    high = (bits >> 32) & 0xFFFFFFFF
    low = bits & 0xFFFFFFFF
    radius = torch.sqrt(-2.0 * torch.log((high.double() + 0.5) / 4294967296.0))
    return (radius * torch.cos(low.double() * (2.0 * math.pi / 4294967296.0))).float()


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right: int64's own keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(value: torch.Tensor) -> torch.Tensor:
    """`_mix` of int64 entries, in wrapping arithmetic."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)
