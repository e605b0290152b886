"""Validation: loss, perplexity and L0 per layer over a fixed set of samples; during training and of a checkpoint."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasparse.config import Config, ConfigError, Problem, check_files, known_settings, parse_config
from megasparse.megatron import LayerStats, build_model, iter_sparse_mlps
from megasparse.megatron.fp8 import amax_kept
from megasparse.training import checkpoint_files
from megasparse.training.callbacks import Metrics
from megasparse.training.checkpoint import Checkpointer, config_of
from megasparse.training.data import StepLoader
from megasparse.training.datasets import build_datasets, validation_samples
from megasparse.training.distributed import initialize, shut_down
from megasparse.training.launch_environment import read_environment
from megasparse.training.layer_stats import LayerCounter
from megasparse.training.optimizer import gather_parameters
from megasparse.training.signals import StopReason
from megasparse.training.step import read_reduction, run_schedule, start_reduction

log = logging.getLogger("megasparse")


def run_validation(
    cfg: Config,
    model: Sequence[torch.nn.Module],
    mlps: Sequence[Any],
    dataset: Any,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
    stop: Callable[[], StopReason] = lambda: StopReason.NONE,
) -> tuple[Metrics, StopReason]:
    """Loss over the first `eval_steps` global batches of `dataset`. Collective; changes nothing of the training.

    Args:
        before_batch: called before each of them.
        stop: why this rank wants to stop, asked after each of them.

    Returns:
        `eval/loss` (nats per counted token), `eval/ppl`, `eval/layer_{i}/l0` and `eval/l0` (mean over layers), the
        same on every rank. Where a rank wanted to stop before the end, none of them, and why.
    """
    loader = StepLoader(cfg, dataset, 0, validation_samples(cfg), dist.get_world_size(), device)
    counter = LayerCounter(mlps, cfg.model.num_layers, cfg.model.ffn_hidden_size)
    total, tokens, reason = 0.0, 0, StopReason.NONE
    with _evaluating(model, mlps, device), torch.no_grad():
        counter.begin()
        for _ in range(cfg.training.eval_steps):
            before_batch()
            reports = run_schedule(cfg, model, loader.next_step(), forward_only=True)
            losses = read_reduction(start_reduction(reports, device, stop()))
            total, tokens, reason = total + losses.total, tokens + losses.tokens, losses.stop
            if reason != StopReason.NONE:
                break
        counter.end()
        counts = counter.take()
    loader.close()
    if reason != StopReason.NONE:
        return {}, reason
    return validation_metrics(total, tokens, counts.l0 if counts is not None else []), reason


def validation_metrics(loss: float, tokens: float, l0: Sequence[float]) -> Metrics:
    """From the summed loss of so many tokens and the L0 of every layer, or of none where it was not counted."""
    mean = loss / tokens if tokens else math.nan
    metrics: Metrics = {"eval/loss": mean, "eval/ppl": math.exp(mean) if mean < 700 else math.inf}
    if l0:
        metrics["eval/l0"] = sum(l0) / len(l0)
        metrics.update({f"eval/layer_{layer}/l0": value for layer, value in enumerate(l0)})
    return metrics


@contextmanager
def _evaluating(model: Sequence[torch.nn.Module], mlps: Sequence[Any], device: torch.device) -> Iterator[None]:
    """Evaluation mode, with recorders of its own, so that training statistics stay those of training; those of fp8
    too."""
    recorders = [mlp.recorder for mlp in mlps]
    gather_parameters(model)
    for chunk in model:
        chunk.eval()
    for mlp in mlps:
        mlp.recorder = LayerStats(mlp.hidden, device)
    try:
        with amax_kept(model):
            yield
    finally:
        for mlp, recorder in zip(mlps, recorders, strict=True):
            mlp.recorder = recorder
        for chunk in model:
            chunk.train()


def evaluate(run: str | Path, overrides: Sequence[str] = ()) -> Metrics:
    """Validates a saved checkpoint at any layout and prints the result on rank 0.

    Args:
        run: a run's directory (its newest complete checkpoint), a directory of checkpoints, or a checkpoint.
        overrides: `a.b=c` on top of the checkpoint's own configuration.

    Raises:
        CheckpointError: no complete checkpoint there.
        ConfigError: the overrides do not fit, or there are no validation data.
    """
    path = checkpoint_files.resolve(Path(run))
    launch = read_environment()
    saved, unknown = known_settings(config_of(path))
    if unknown and launch.rank == 0:
        log.warning("%s: was saved by another version of megasparse; left out: %s", path, ", ".join(unknown))
    data = saved.setdefault("data", {})
    data["cache_dir"] = data.get("cache_dir") or str(_cache_beside(Path(run), path))
    # What the run itself started from is not needed any more.
    cfg = parse_config(saved, ["checkpoint.load=null", *with_training_data(overrides)], source=str(path))
    check_files(cfg)
    cfg.validate(launch.world_size)
    device = initialize(cfg, launch)
    try:
        datasets = build_datasets(cfg, launch.local_rank, train=False)
        if datasets.valid is None:
            fix = "give data.valid=PREFIX or training.eval_steps=10"
            raise ConfigError([Problem("data.valid", f"{path}: its configuration has no validation data", fix)])
        model: list[torch.nn.Module] = list(build_model(cfg))
        step = Checkpointer(cfg).load_weights(path, model, None)
        for chunk in model:
            chunk.to(device)
        metrics, _ = run_validation(cfg, model, list(iter_sparse_mlps(model)), datasets.valid, device)
        print_metrics(f"{path} (step {step})", cfg, metrics)
    finally:
        shut_down()
    return metrics


def user_cache() -> Path:
    """For sample indices that belong to no run of the user's."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megasparse"


def _cache_beside(run: Path, checkpoint: Path) -> Path:
    """The sample indices of the run that was named, where it has some and they can be added to: it may have been moved,
    or be another user's."""
    places = (folder / "cache" for folder in (run, checkpoint.parent.parent))
    return next((place for place in places if place.is_dir() and os.access(place, os.W_OK | os.X_OK)), user_cache())


def with_training_data(overrides: Sequence[str]) -> list[str]:
    """Lets `data.valid=PREFIX` alone stand for all the data of a validation, whatever a run was trained on."""
    valid = [text for text in overrides if text.startswith("data.valid=")]
    if not valid or any(text.startswith(("data.blend=", "data.train=")) for text in overrides):
        return list(overrides)
    return ["data.blend=null", "data.test=null", "data.train=" + valid[-1].removeprefix("data.valid="), *overrides]


def print_metrics(title: str, cfg: Config, metrics: Metrics) -> None:
    """On rank 0."""
    if dist.get_rank() == 0:
        print(f"{title}, {validation_samples(cfg)} samples of {cfg.data.sequence_length} tokens")
        for name, value in metrics.items():
            print(f"  {name:24} {value:.6g}")
