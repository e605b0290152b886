"""What the training loop shows to the outside: the state of a run, and the moments at which observers are called.

Observers (monitoring, custom hooks) never steer the run; they are called on *every* rank, so that they may use
collectives, and always in the order in which they were given. An observer that writes files or talks to a server
does so on one rank only (`TrainState.is_writer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from megasparse.config import Config

Metrics = dict[str, float | str]


@dataclass
class TrainState:
    """Everything that a run is, at one moment. All counters are those of the whole job, equal on every rank.

    `step` counts finished iterations (skipped ones too): in `on_step_end` it is the number of the step that has just
    ended, 1 for the first. A run resumed from the checkpoint of step n starts with `step == n`.
    """

    cfg: Config
    model: list[torch.nn.Module]
    """Model chunks of this rank (several when interleaved), wrapped in Megatron's DistributedDataParallel."""
    optimizer: Any
    """Megatron's MegatronOptimizer."""
    scheduler: Any
    """`training.schedule.LearningRate`."""
    l1: Any
    """`training.l1.L1Controller`: `.coefficients` is a list of one float a global layer."""
    mlps: list[Any]
    """The `SparseMLP` modules of this rank, in order; each has `.layer_index` (global), `.router`, `.recorder`."""
    is_writer: bool
    """True on the single rank that writes metrics files and talks to W&B (global rank 0)."""
    run_directory: Path
    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite: their update was not applied."""
    wandb_run_id: str | None = None
    """Saved in every checkpoint. The W&B sink sets it in `on_start` when it is None and resumes that run otherwise."""
    resumed_from: Path | None = None
    """The checkpoint that this run continues, or None when it started from scratch."""
    parameters: int = 0
    """Parameters of the whole model (tied embeddings counted once)."""
    exit_code: int = 0
    """What the process will end with (`training/signals.py`); known in `on_end`."""

    @property
    def updates(self) -> int:
        """Steps that made an update."""
        return self.step - self.skipped_steps


class Observer(Protocol):
    """What the loop calls; `Callback` says when."""

    def on_start(self, state: TrainState) -> None: ...

    def on_step_start(self, state: TrainState) -> None: ...

    def on_step_end(self, state: TrainState, metrics: Metrics) -> None: ...

    def on_eval(self, state: TrainState, metrics: Metrics) -> None: ...

    def on_checkpoint(self, state: TrainState, path: Path) -> None: ...

    def on_end(self, state: TrainState) -> None: ...


class Callback:
    """Base of observers: every method does nothing. Subclasses override what they need."""

    def on_start(self, state: TrainState) -> None:
        """Before the first step; `state.step` is already the resumed step."""

    def on_step_start(self, state: TrainState) -> None:
        """Before the forward pass of step `state.step + 1` (memory probes hook in here)."""

    def on_step_end(self, state: TrainState, metrics: Metrics) -> None:
        """After the optimizer step; `metrics` holds what every rank knows of the step, as host numbers, each step:

        `loss/lm` (mean cross entropy over the counted tokens of the global batch, nats), `grad_norm` (before
        clipping), `lr`, `l1/coeff` (mean over layers), `l1/layer_{i}/coeff`, `optim/skipped_steps` (total),
        `progress/tokens`, `progress/samples`, `perf/step_time_s` (wall clock, whole step), `perf/data_wait_s`
        (waiting for the data loader on this rank, most of it in the step before, while the GPU worked on),
        `perf/own_time_s` (of the step, before waiting for other replicas, on this rank), `perf/gpu_wait_s` (of it,
        waiting for this rank's GPU after launching all), `progress/tokens/{data set}` and, when rows were
        re-initialised in this step, `dead_neurons/layer_{i}/reinitialised`. Callbacks may add to it for those that
        follow.
        """

    def on_eval(self, state: TrainState, metrics: Metrics) -> None:
        """After a validation pass: `eval/loss` (nats per counted token), `eval/ppl`, `eval/l0` and
        `eval/layer_{i}/l0` (active neurons per token)."""

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        """After a checkpoint is complete on disk at `path` (for asynchronous saves, when `latest` names it)."""

    def on_end(self, state: TrainState) -> None:
        """After the last step, also after an early exit (`state.exit_code`)."""


class CallbackList(Callback):
    """Calls several observers, in order."""

    def __init__(self, callbacks: Sequence[Observer]) -> None:
        self.callbacks = list(callbacks)

    def on_start(self, state: TrainState) -> None:
        for callback in self.callbacks:
            callback.on_start(state)

    def on_step_start(self, state: TrainState) -> None:
        for callback in self.callbacks:
            callback.on_step_start(state)

    def on_step_end(self, state: TrainState, metrics: Metrics) -> None:
        for callback in self.callbacks:
            callback.on_step_end(state, metrics)

    def on_eval(self, state: TrainState, metrics: Metrics) -> None:
        for callback in self.callbacks:
            callback.on_eval(state, metrics)

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        for callback in self.callbacks:
            callback.on_checkpoint(state, path)

    def on_end(self, state: TrainState) -> None:
        for callback in self.callbacks:
            callback.on_end(state)
