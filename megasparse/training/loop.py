"""The training loop. Read `train` first: it is the whole run in the order in which things happen."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec

from megasparse.config import Config, dump_config
from megasparse.host import host_name
from megasparse.megatron import build_model, iter_sparse_mlps
from megasparse.megatron.attention_graphs import AttentionGraphs
from megasparse.plan.text import not_exportable, opening_line
from megasparse.ranks import on_first_rank
from megasparse.training.callbacks import CallbackList, Metrics, Observer, TrainState
from megasparse.training.checkpoint import Checkpointer
from megasparse.training.data import StepLoader, data_probes
from megasparse.training.datasets import Datasets, build_datasets
from megasparse.training.dead_neurons import forget_inputs, reinit_is_due, reinitialise, watch_inputs
from megasparse.training.distributed import initialize, say_once_for_each_layer, shut_down
from megasparse.training.evaluate import run_validation
from megasparse.training.garbage import GarbageCollection
from megasparse.training.heartbeat import Heartbeat
from megasparse.training.l1 import L1Controller
from megasparse.training.launch_environment import Launch, read_environment
from megasparse.training.layer_stats import LayerCounter, LayerCounts
from megasparse.training.optimizer import build_optimizer, not_finite_gradients, wrap_in_ddp
from megasparse.training.own_time import OwnTime
from megasparse.training.restore import check_samples, restore
from megasparse.training.run_lock import run_lock
from megasparse.training.schedule import LearningRate
from megasparse.training.signals import (
    EXIT_DONE,
    EXIT_NOT_FINITE,
    EXIT_REQUEUE,
    StopReason,
    StopWatcher,
    clear_exit_file,
    write_exit_file,
)
from megasparse.training.sources import SourceTokens
from megasparse.training.step import NotFiniteError, StepResult, connect_schedule, train_step

log = logging.getLogger("megasparse")

MAX_SKIPPED_IN_A_ROW = 10
"""Steps without an update, because loss or gradient was not finite, after which the run gives up."""


@dataclass
class Run:
    """What the loop works with, besides the state that observers see."""

    cfg: Config
    state: TrainState
    datasets: Datasets
    loader: StepLoader
    counter: LayerCounter
    checkpointer: Checkpointer
    callbacks: CallbackList
    stop: StopWatcher
    heartbeat: Heartbeat
    own_time: OwnTime
    sources: SourceTokens
    device: torch.device
    graphs: AttentionGraphs | None
    skipped_in_a_row: int = 0
    owes_validation: bool = False
    """Of the last step, in which it was told to stop: to be done when all else is, as it may outlast the time left."""


def train(run: Run) -> StopReason:
    """Runs the steps that are left. Returns why it ended early, or NONE where none is left.

    Raises:
        NotFiniteError: on all ranks, after too many steps in a row without an update, or where no step had one.
    """
    cfg, state = run.cfg, run.state
    reason = StopReason.NONE
    run.callbacks.on_start(state)
    run.stop.catch_interrupts()
    with GarbageCollection() as garbage:
        while state.step < cfg.training.steps and reason == StopReason.NONE:
            run.callbacks.on_step_start(state)
            result, metrics = run_step(run)
            run.callbacks.on_step_end(state, metrics)
            reason = result.stop
            last = state.step == cfg.training.steps
            evaluates = is_due(cfg.training.eval_interval, state.step, last) and reason == StopReason.NONE
            if evaluates:
                reason = validate(run)
            end = last or reason != StopReason.NONE
            # While steps are skipped the weights may be what is broken: saved at the end alone, beside those before.
            saves = is_due(cfg.checkpoint.interval, state.step, end) and (end or run.skipped_in_a_row == 0)
            # Before the first update there is nothing to keep, and Transformer Engine's Adam has no state to save.
            saves = saves and state.updates > 0
            if saves:
                run.heartbeat.at(state.step, "checkpoint")
                save(run)
            run.checkpointer.poll()
            garbage.after_step(state.step, paused=evaluates or saves)
    if reason == StopReason.NONE or state.step >= cfg.training.steps:
        if state.updates == 0:
            raise NotFiniteError(f"none of the {state.step} steps made an update (each said why), so nothing is saved")
        run.owes_validation = reason != StopReason.NONE and run.datasets.valid is not None
        return StopReason.NONE
    return reason


def run_step(run: Run) -> tuple[StepResult, Metrics]:
    """One whole step, from its data to what follows the update; its result and what observers are told of it."""
    started = time.perf_counter()
    rate = prepare_step(run, run.state.step + 1)
    run.heartbeat.at(run.state.step + 1, "reading data")
    run.own_time.start()
    batches = run.loader.next_step()
    run.heartbeat.at(run.state.step + 1, "training")
    state = run.state

    def while_backward_runs() -> None:
        run.counter.end()
        run.heartbeat.at(state.step + 1, "reading data ahead")
        run.loader.look_ahead()
        run.heartbeat.at(state.step + 1, "update")

    result = train_step(
        run.cfg, state.model, state.optimizer, batches, run.stop.local_reason(), after_backward=while_backward_runs
    )
    run.heartbeat.at(state.step + 1, "after the update")
    reinitialised = finish_step(run, result)
    seconds = time.perf_counter() - started
    return result, step_metrics(run, result, rate, seconds, reinitialised)


def is_due(interval: int, step: int, end: bool) -> bool:
    """Every `interval` steps (0: never) and at the end."""
    return end or (interval > 0 and step % interval == 0)


def prepare_step(run: Run, step: int) -> float:
    """Sets learning rate and L1 coefficients of the step and what is counted in it; returns the learning rate."""
    run.state.l1.set_step(step, run.state.mlps)
    reinit = reinit_is_due(run.cfg, step)
    if run.state.l1.needs_statistics or routes_after(run.cfg, step) or reinit:
        run.counter.begin()
    if reinit:
        watch_inputs(run.state.mlps)
    if run.graphs is not None:
        run.graphs.prepare_step()
    return float(run.state.scheduler.set_step(step))


def finish_step(run: Run, result: StepResult) -> list[int] | None:
    """Everything that follows the update: counters, L1 coefficients, routers, dead neurons.

    Returns:
        re-initialised neurons of every layer, or None where it was not due.

    Raises:
        NotFiniteError: this was one skipped step too many.
    """
    cfg, state = run.cfg, run.state
    state.step += 1
    state.consumed_samples += cfg.training.global_batch_size
    state.consumed_tokens += cfg.training.global_batch_size * cfg.data.sequence_length
    count_skipped(run, result)
    counts = run.counter.take()
    # Activations may have been infinite, or none of them counted: they must move nothing.
    if not result.updated or result.tokens == 0:
        for mlp in state.mlps:
            mlp.recorder.forget_step()
        forget_inputs(state.mlps)
        return None
    for mlp in state.mlps:
        mlp.recorder.end_step()
    if counts is not None:
        state.l1.update(state.step, counts.l0)
        if routes_after(cfg, state.step):
            route(cfg, state, counts)
        if reinit_is_due(cfg, state.step):
            return reinitialise(cfg, state.mlps, state.optimizer, state.step, counts.l0)
    return None


def count_skipped(run: Run, result: StepResult) -> None:
    """Reports a step without an update, and gives up after too many of them."""
    if result.updated:
        run.skipped_in_a_row = 0
        return
    run.state.skipped_steps += 1
    run.skipped_in_a_row += 1
    where = f"loss not finite on ranks {result.not_finite_ranks}" if result.not_finite_ranks else "gradient not finite"
    text = f"step {run.state.step}: no update: loss {result.loss}, gradient norm {result.grad_norm} ({where})"
    if run.state.is_writer:
        log.warning(text)
    if run.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        guilty = not_finite_gradients(run.state.model)
        raise NotFiniteError(
            f"{text}\nThat was step {run.skipped_in_a_row} in a row without an update: giving up. Gradients that are "
            f"not finite: {guilty or 'none'}. The last checkpoints are as they were; look at the learning rate, at the "
            f"data around sample {run.state.consumed_samples}, and at the hardware of the ranks named."
        )


def routes_after(cfg: Config, step: int) -> bool:
    """Whether layers choose their path after this step."""
    return cfg.sparsity.path != "dense" and step % cfg.sparsity.route_interval == 0


def route(cfg: Config, state: TrainState, counts: LayerCounts) -> None:
    """Gives each layer's router the statistics of the step, the same on every rank, and how often this rank's neurons
    have fired since the last time."""
    tokens = cfg.training.micro_batch_size * cfg.data.sequence_length // cfg.parallel.context
    for mlp in state.mlps:
        mlp.router.update(
            counts.l0[mlp.layer_index] / cfg.parallel.tensor,
            counts.union_fraction[mlp.layer_index],
            mlp.recorder.tile_counts,
            tokens=tokens,
        )
        mlp.recorder.forget_tiles()


def step_metrics(run: Run, result: StepResult, rate: float, seconds: float, reinitialised: list[int] | None) -> Metrics:
    """See `Callback.on_step_end`."""
    state = run.state
    coefficients = state.l1.coefficients
    metrics: Metrics = {
        "loss/lm": result.loss,
        "grad_norm": result.grad_norm,
        "lr": rate,
        "l1/coeff": sum(coefficients) / len(coefficients),
        "optim/skipped_steps": state.skipped_steps,
        "progress/tokens": state.consumed_tokens,
        "progress/samples": state.consumed_samples,
        **run.sources.metrics(state.consumed_samples),
        "perf/step_time_s": seconds,
        "perf/data_wait_s": run.loader.wait_seconds,
        "perf/own_time_s": run.own_time.seconds(),
        "perf/gpu_wait_s": result.gpu_wait_seconds,
    }
    metrics.update({f"l1/layer_{layer}/coeff": value for layer, value in enumerate(coefficients)})
    if reinitialised is not None:
        metrics.update({f"dead_neurons/layer_{layer}/reinitialised": n for layer, n in enumerate(reinitialised)})
    return metrics


def validate(run: Run, whole: bool = False) -> StopReason:
    """Where there are data for it. Returns why it ended without a result (not where it is to be `whole`), or NONE."""
    if run.datasets.valid is None:
        return StopReason.NONE
    cfg, state = run.cfg, run.state
    alive = partial(run.heartbeat.at, state.step, "validation")
    stop = (lambda: StopReason.NONE) if whole else run.stop.local_reason
    metrics, reason = run_validation(cfg, state.model, state.mlps, run.datasets.valid, run.device, alive, stop)
    if reason == StopReason.NONE:
        run.callbacks.on_eval(state, metrics)
    return reason


def save(run: Run) -> None:
    """Saves a checkpoint of everything after the step that has just ended."""
    probes = [list(probe) for probe in data_probes(run.datasets.train, run.state.consumed_samples)]
    run.checkpointer.save(run.state, {"data": probes}, keep_older=run.skipped_in_a_row > 0)


def pretrain(cfg: Config, callbacks: Sequence[Observer] | None = None) -> int:
    """Trains as the configuration says, from scratch or from the newest checkpoint of the run.

    Args:
        cfg: the run. Every rank of the job calls with the same.
        callbacks: observers; None: the project's own monitoring.

    Returns:
        the process's exit code: see `signals.py`.

    Raises:
        ConfigError, LaunchError, RunLockedError, CheckpointError, DataChangedError: what is wrong and what to do.
        StorageError: the file system failed.
    """
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    launch = read_environment()
    cfg.validate(launch.world_size)
    device = initialize(cfg, launch)
    say_once_for_each_layer()
    first = launch.rank == 0
    watcher = StopWatcher(cfg.training.time_limit_minutes, cfg.run_directory if first else None)
    own = [cfg.checkpoint_directory] if cfg.checkpoint.directory else []  # else within the run directory
    with run_lock(cfg.run_directory, *own), watcher as stop:
        on_first_rank(partial(clear_exit_file, cfg.run_directory))
        run = start(cfg, launch, device, stop, callbacks)
        with run.heartbeat:
            try:
                reason = train(run)
                code, text = (EXIT_DONE, "done") if reason == StopReason.NONE else (EXIT_REQUEUE, reason.name)
            except NotFiniteError as error:
                code, text = EXIT_NOT_FINITE, str(error)
                if first:
                    log.error(text)
            run.heartbeat.at(run.state.step, "checkpoint")
            run.checkpointer.close()
        run.loader.close()
        if run.graphs is not None:
            run.graphs.release()
        if first:  # before observers end: they may take long, and the time left may be short
            write_exit_file(cfg.run_directory, code, text, run.state.step)
            stop.clear_stop_file()
        if run.owes_validation:
            if first:
                log.info("told to stop in the last step, which is saved; only its validation is left")
            validate(run, whole=True)
        run.state.exit_code = code
        run.callbacks.on_end(run.state)
        if first and code == EXIT_REQUEUE:
            goes_on = "goes on from there" if run.state.updates else "starts again, as no step made an update"
            log.info("stopped (%s) after step %d; the same command %s", text, run.state.step, goes_on)
        if code != EXIT_DONE:
            # torchrun ends all ranks half a minute after the first that left so: not while rank 0 still uploads.
            on_first_rank(lambda: None)
    shut_down()
    return code


def start(
    cfg: Config,
    launch: Launch,
    device: torch.device,
    stop: StopWatcher,
    callbacks: Sequence[Observer] | None,
    layer: ModuleSpec | None = None,
) -> Run:
    """Builds everything and brings it to where the run left off. `layer`: see `build_model`."""
    first = launch.rank == 0
    on_first_rank(partial(cfg.run_directory.mkdir, parents=True, exist_ok=True))
    datasets = build_datasets(cfg, launch.local_rank)
    model = wrap_in_ddp(cfg, build_model(cfg, layer))
    optimizer = build_optimizer(cfg, model)
    own_time = OwnTime(device)
    connect_schedule(model, own_time)
    mlps = list(iter_sparse_mlps(model))
    state = TrainState(
        cfg=cfg,
        model=model,
        optimizer=optimizer,
        scheduler=LearningRate(cfg, optimizer),
        l1=L1Controller(cfg),
        mlps=mlps,
        is_writer=first,
        run_directory=cfg.run_directory,
        parameters=count_parameters(model),
    )
    if callbacks is None:
        from megasparse.monitoring.monitor import Monitor

        callbacks = [Monitor()]
    observers = CallbackList(callbacks)
    checkpointer = Checkpointer(cfg, on_saved=lambda path: observers.on_checkpoint(state, path))
    checkpointer.prepare()
    restore(cfg, checkpointer, state, datasets)
    check_samples(cfg, state)
    if first:  # not before: where the run is refused, the file stays that of the checkpoints
        with contextlib.suppress(OSError):
            (cfg.run_directory / "config.yaml").write_text(dump_config(cfg))
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        log.info(opening_line(cfg, launch.world_size, state.parameters, gpu))
        if text := not_exportable(cfg):
            log.warning(text)
        if state.step >= cfg.training.steps:
            log.info(
                "nothing to do: training.steps is %d, and the run has done %d; set more of them to go on, or another "
                "run.name to start anew",
                cfg.training.steps,
                state.step,
            )
    loader = StepLoader(
        cfg,
        datasets.train,
        state.consumed_samples,
        cfg.training.steps * cfg.training.global_batch_size,
        launch.world_size,
        device,
    )
    counter = LayerCounter(mlps, cfg.model.num_layers, cfg.model.ffn_hidden_size)
    heartbeat = Heartbeat(
        cfg.run_directory, launch.rank, launch.world_size, host_name(), 60 * cfg.parallel.timeout_minutes
    )
    return Run(
        cfg=cfg,
        state=state,
        datasets=datasets,
        loader=loader,
        counter=counter,
        checkpointer=checkpointer,
        callbacks=observers,
        stop=stop,
        heartbeat=heartbeat,
        own_time=own_time,
        sources=SourceTokens(cfg, datasets.train),
        device=device,
        graphs=AttentionGraphs(model) if cfg.training.cuda_graphs and device.type == "cuda" else None,
    )


def count_parameters(model: Sequence[torch.nn.Module]) -> int:
    """Parameters of the whole model; the last stage's copy of a tied embedding is not counted. Collective."""
    own = 0
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if name.endswith("output_layer.weight") and getattr(parameter, "shared_embedding", False):
                continue
            sharded = getattr(parameter, "tensor_model_parallel", False)
            if sharded or parallel_state.get_tensor_model_parallel_rank() == 0:
                own += parameter.numel()
    total = torch.tensor([own], dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total.item())


__all__ = ["Run", "pretrain", "train"]
