"""The callback that observes a run: measures on logged steps and hands one record to every sink.

Between logged steps it does next to nothing. On a logged step: at most three small collectives and one copy to the
host. `loss/lm`, `loss/l1` and sparsity are those of the logged step's global batch; `throughput/*`,
`perf/step_time_s` and `perf/data_wait_s` are of all steps since the record before, `energy/*` of those of them that
follow the last pause.
Pauses for validation and checkpoints count in none.
`perf/monitor_share` is the share of the time since that record that this callback itself took.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megasparse.host import host_name
from megasparse.monitoring.energy import EnergyMeter
from megasparse.monitoring.environment import describe_environment, record_start
from megasparse.monitoring.memory import LayerMemoryProbe, PeakMemory, resident_bytes
from megasparse.monitoring.record import Record, Value, read_records
from megasparse.monitoring.report import ReportError, write_report
from megasparse.monitoring.sinks.console import ConsoleSink
from megasparse.monitoring.sinks.jsonl import JsonlSink
from megasparse.monitoring.sparsity import COLUMNS, SparsityMeter, l1_loss
from megasparse.monitoring.stragglers import Stragglers
from megasparse.monitoring.throughput import Throughput
from megasparse.ranks import on_first_rank
from megasparse.training.signals import EXIT_NOT_FINITE

if TYPE_CHECKING:
    from pathlib import Path

    from megasparse.training.callbacks import Metrics, TrainState

logger = logging.getLogger(__name__)

_PEAKS = ("memory/peak_allocated_bytes", "memory/peak_reserved_bytes", "memory/rss_bytes", "memory/peak_rss_bytes")


class Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self, failed: bool = False) -> None:
        """At the end of the run. `failed`: it gave up."""


class _Stopwatch:
    """Sums the time spent in `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.seconds += time.perf_counter() - self._start


class Monitor:
    """A `training.callbacks.Callback`. Every rank has one; files and W&B are the writing rank's."""

    def on_start(self, state: TrainState) -> None:
        cfg = state.cfg
        self._interval = cfg.logging.interval
        self._steps = cfg.training.steps
        world_size = dist.get_world_size()
        self._meter = SparsityMeter(state.mlps, cfg.model.num_layers, cfg.model.ffn_hidden_size)
        self._throughput = Throughput(cfg, world_size)
        self._energy = EnergyMeter()
        self._peak = PeakMemory()
        self._probe = LayerMemoryProbe(state.mlps, self._peak)
        self._memory_step: int | None = None
        self._samples_memory = False
        self._spent = _Stopwatch()
        places: list[tuple[str, int]] = [("", 0)] * world_size
        dist.all_gather_object(places, (host_name(), parallel_state.get_pipeline_model_parallel_rank()))
        self._stragglers = Stragglers([host for host, _ in places], [stage for _, stage in places])
        self._carried: dict[str, float] = {}
        self._directory = cfg.logging_directory
        self._console: ConsoleSink | None = None
        self._sinks: list[Sink] = []
        self._failing: list[Sink] = []
        on_first_rank(partial(self._open_sinks, state, world_size))
        if cfg.logging.wandb.mode != "disabled":
            identity = [state.wandb_run_id]
            # Every rank may write the part of a checkpoint that holds the id.
            dist.broadcast_object_list(identity, src=0)
            state.wandb_run_id = identity[0]
        self._begin_window(state)

    def _open_sinks(self, state: TrainState, world_size: int) -> None:
        cfg, logs = state.cfg, state.cfg.logging
        self._directory.mkdir(parents=True, exist_ok=True)
        environment = describe_environment(world_size) | {"parameters": state.parameters}
        config = cfg.model_dump(mode="json")
        record_start(self._directory, config, environment, state.step)
        with ExitStack() as stack:  # a sink that fails to open closes those before it
            if logs.jsonl:
                self._sinks.append(JsonlSink(self._directory, state.step))
                stack.callback(self._sinks[-1].close)
            if logs.wandb.mode != "disabled":
                # Where W&B is disabled it need not be installed.
                from megasparse.monitoring.sinks.wandb import WandbSink

                sink = WandbSink(
                    self._directory,
                    mode=logs.wandb.mode,
                    project=logs.wandb.project,
                    entity=logs.wandb.entity,
                    name=logs.wandb.name or cfg.run.name,
                    tags=logs.wandb.tags,
                    config=config | {"environment": environment},
                    git_commit=environment["git_commit"],
                    run_id=state.wandb_run_id,
                    resumed_step=state.step,
                    history=read_records(self._directory / "metrics.jsonl") if logs.jsonl else (),
                )
                state.wandb_run_id = sink.run_id
                self._sinks.append(sink)
            if logs.console:
                self._console = ConsoleSink(self._steps, state.step)
                self._sinks.append(self._console)
            stack.pop_all()

    def _is_logged(self, step: int) -> bool:
        return step % self._interval == 0 or step in (1, self._steps)

    def _begin_window(self, state: TrainState) -> None:
        self._window_tokens = state.consumed_tokens
        self._window_steps, self._window_seconds, self._window_own, self._window_data = 0, 0.0, 0.0, 0.0
        self._window_started = time.perf_counter()
        self._spent.seconds = 0.0
        self._begin_metering(state)

    def _begin_metering(self, state: TrainState) -> None:
        """From here on the GPU's energy is that of steps; `_energy` has just been read."""
        self._metered_from = state.consumed_tokens
        self._paused = False

    def on_step_start(self, state: TrainState) -> None:
        if self._paused:
            self._energy.read()
            self._begin_metering(state)
        if not self._is_logged(state.step + 1):
            return
        with self._spent:
            self._meter.begin()
            every, last = state.cfg.logging.memory_interval, self._memory_step
            self._samples_memory = last is None or (state.step + 1) // every > last // every
            if self._samples_memory:
                self._probe.arm()

    def on_step_end(self, state: TrainState, metrics: Metrics) -> None:
        self._window_steps += 1
        self._window_seconds += float(metrics["perf/step_time_s"])
        self._window_own += float(metrics["perf/own_time_s"])
        self._window_data += float(metrics["perf/data_wait_s"])
        for name, value in metrics.items():
            if name.startswith("dead_neurons/") and isinstance(value, float | int):
                self._carried[name] = self._carried.get(name, 0) + value
        if self._console is not None:
            self._console.advance(state.step)
        if not self._is_logged(state.step):
            return
        with self._spent:
            measured = self._measure(state, metrics)
        observed = time.perf_counter() - self._window_started
        measured["perf/monitor_share"] = self._spent.seconds / observed if observed > 0 else 0.0
        self._begin_window(state)
        with self._spent:
            self._write(Record(state.step, time.time(), "train", {**metrics, **self._carried, **measured}))
        self._carried.clear()

    def _measure(self, state: TrainState, metrics: Metrics) -> dict[str, Value]:
        """Everything that takes measuring, reduced over all ranks. Collective."""
        layers = state.cfg.model.num_layers
        # `steps_since_fired` can have counted no more than the updates.
        table = self._meter.table(window=max(1, min(state.cfg.sparsity.dead_window_steps, state.updates)))
        own = [0.0] * dist.get_world_size()
        own[dist.get_rank()] = self._window_own
        energy = (self._energy.read(), float(self._energy.available))
        sums = torch.cat([table.flatten(), table.new_tensor([*energy, *own])])
        data_wait = self._window_data / self._window_steps
        maxima = table.new_tensor([*self._peak.read(), *resident_bytes(), data_wait])
        if self._samples_memory:
            maxima = torch.cat([maxima, self._layer_memory(state, table).flatten()])
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        host = torch.cat([sums, maxima]).tolist()

        rows = [host[row * COLUMNS : (row + 1) * COLUMNS] for row in range(layers)]
        joules, metered, *rest = host[layers * COLUMNS :]
        own, rest = rest[: len(own)], rest[len(own) :]
        peaks, data_wait, memory = rest[: len(_PEAKS)], rest[len(_PEAKS)], rest[len(_PEAKS) + 1 :]
        sparsity = self._meter.read(rows)
        result: dict[str, Value] = dict(self._meter.metrics(sparsity))
        result["loss/l1"] = l1_loss(sparsity, state.l1.coefficients)
        for name, value in zip(_PEAKS, peaks, strict=True):
            if value or not name.startswith("memory/peak_"):  # no allocator statistics without CUDA
                result[name] = int(value)
        result["perf/data_wait_s"] = data_wait
        result |= self._own_time(state, own)
        for index in range(len(memory) // 2):
            saved, peak = memory[2 * index : 2 * index + 2]
            if saved >= 0:
                result[f"memory/layer_{index}/saved_bytes"] = int(saved)
                result[f"memory/layer_{index}/peak_bytes"] = int(peak)
        tokens = state.consumed_tokens - self._window_tokens
        unions = [1.0 if layer.path == "dense" else layer.union_fraction for layer in sparsity]
        result |= self._throughput.metrics(tokens, self._window_seconds, unions)
        result["perf/step_time_s"] = self._window_seconds / self._window_steps
        metered_tokens = state.consumed_tokens - self._metered_from
        if metered == dist.get_world_size() and metered_tokens > 0:
            result["energy/joules_per_token"] = joules / metered_tokens
        return result

    def _own_time(self, state: TrainState, own: list[float]) -> dict[str, Value]:
        """Of each rank's own time in this window: the slowest rank's, which rank that is, and times its median."""
        rank, share = self._stragglers.slowest(own)
        finding = self._stragglers.add(own, self._window_steps)
        if finding is not None and state.is_writer:
            logger.warning(finding)
        seconds = own[rank] / self._window_steps
        return {"perf/own_time_s": seconds, "perf/slowest_rank": rank, "perf/slowest_rank_ratio": share}

    def _layer_memory(self, state: TrainState, like: torch.Tensor) -> torch.Tensor:
        """float64 [num_layers, 2] of this rank's saved and peak bytes, -1 where it has no measurement."""
        result = like.new_full((state.cfg.model.num_layers, 2), -1.0)
        sampled = self._probe.collect()
        if sampled is not None:
            rows = [[layer.saved_bytes, layer.peak_bytes] for layer in sampled]
            result[[mlp.layer_index for mlp in state.mlps]] = result.new_tensor(rows)
        self._memory_step = state.step
        return result

    def on_eval(self, state: TrainState, metrics: Metrics) -> None:
        self._write(Record(state.step, time.time(), "valid", dict(metrics)))
        self._paused = True
        self._peak.read()  # what validation allocated is no step's

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        self._paused = True

    def on_end(self, state: TrainState) -> None:
        for sink in self._sinks:
            with self._kept_going(sink):
                sink.close(failed=state.exit_code == EXIT_NOT_FINITE)
        if state.is_writer and state.cfg.logging.report and state.cfg.logging.jsonl:
            try:
                path = write_report(self._directory)
                logger.info("report: %s", path)
            except ReportError as error:  # a run stopped before its first record
                logger.warning("no report: %s", error)

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            with self._kept_going(sink):
                sink.write(record)

    @contextmanager
    def _kept_going(self, sink: Sink) -> Iterator[None]:
        """A full disk, or W&B's process gone: the run goes on. Says so once, until the sink works again."""
        try:
            yield
        except OSError as error:
            if sink not in self._failing:
                logger.warning("%s: metrics are being lost (%s); the run goes on", type(sink).__name__, error)
                self._failing.append(sink)
        else:
            if sink in self._failing:
                self._failing.remove(sink)
