"""Validation of a model in Hugging Face format, by transformers: what `evaluate.py` measures of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasparse.config import Config, ConfigError, Problem, check_files, parse_config
from megasparse.hf.assets import has_tokenizer
from megasparse.hf.config import SourceModel
from megasparse.hf.load import load_transformers
from megasparse.hf.model_folder import ModelFolder
from megasparse.training.callbacks import Metrics
from megasparse.training.data import StepLoader
from megasparse.training.datasets import build_datasets, validation_samples
from megasparse.training.distributed import initialize, shut_down
from megasparse.training.evaluate import print_metrics, user_cache, validation_metrics, with_training_data
from megasparse.training.launch_environment import read_environment


def evaluate_folder(folder: Path, overrides: Sequence[str] = ()) -> Metrics:
    """Loss, perplexity and, where the activation is ReLU, L0 of a model over a validation set; prints them on rank 0.

    The model runs in bf16, or in fp32 where its weights are (`training.precision`). Several processes share the
    samples; each holds the whole model.

    Args:
        folder: a model that `megasparse convert from-hf` takes, or that `to-hf` made.
        overrides: `a.b=c`: the data, and how much of it.

    Returns:
        `eval/loss` (nats per counted token), `eval/ppl`, and `eval/layer_{i}/l0` and `eval/l0` (active neurons per
        counted token), the same on every rank.

    Raises:
        ConvertError: the folder holds no such model.
        ConfigError: the overrides, or the data, do not fit.
    """
    model_folder = ModelFolder(folder)
    described = model_folder.described
    cfg = _config(model_folder, overrides)
    launch = read_environment()
    cfg.validate(launch.world_size)
    device = initialize(cfg, launch)
    try:
        dataset = build_datasets(cfg, launch.local_rank, train=False).valid
        precision = torch.float32 if cfg.training.precision == "fp32" else torch.bfloat16
        model = load_transformers(model_folder, precision).to(device)
        model_folder.close()
        loader = StepLoader(cfg, dataset, 0, validation_samples(cfg), dist.get_world_size(), device)
        metrics = _measure(cfg, model, loader, described)
        loader.close()
        title = f"{folder} ({described.architecture.class_name}, {described.activation})"
        print_metrics(title, cfg, metrics)
        if described.activation != "relu" and dist.get_rank() == 0:
            print(f"  no L0: {described.activation} has no neurons that are exactly off")
    finally:
        shut_down()
    return metrics


def _config(folder: ModelFolder, overrides: Sequence[str]) -> Config:
    """The model with settings that suit a validation. Raises ConfigError where the overrides do not fit."""
    described = folder.described
    data: dict[str, Any] = {
        "sequence_length": min(described.max_position_embeddings, 2048),
        "cache_dir": str(user_cache()),
    }
    if has_tokenizer(folder.path):
        data["tokenizer"] = str(folder.path)
    base = {
        "model": described.model.model_dump(mode="json"),
        "data": data,
        "training": {
            "global_batch_size": 8,
            "steps": 1,
            "eval_steps": 50,
            "precision": "fp32" if folder.dtype == torch.float32 else "bf16",
        },
    }
    cfg = parse_config(base, with_training_data(overrides), source=str(folder.path / "config.json"))
    problems = [
        Problem(key, "a model in Hugging Face format is as its folder says, computed by transformers", "leave it out")
        for key in (text.partition("=")[0].strip() for text in overrides)
        if key.startswith(("model.", "sparsity.", "training.fp8")) and key != "model.max_position_embeddings"
    ]
    if not cfg.data.prefixes:
        fix = "give data.valid=PREFIX, written by `megasparse preprocess` with the model's tokenizer"
        problems.append(Problem("data.valid", "nothing to validate on", fix))
    elif not cfg.training.eval_steps or (cfg.data.blend is None and cfg.data.valid is None):
        fix = "give data.valid=PREFIX and training.eval_steps=50"
        problems.append(Problem("training.eval_steps", "nothing to validate on", fix))
    if cfg.parallel.model_size > 1:
        rule = "a model in Hugging Face format is whole in every process"
        problems.append(Problem("parallel", rule, "leave tensor, pipeline and context out", cfg.parallel.model_size))
    if cfg.data.reset_attention_mask:
        rule = "not available for models in Hugging Face format"
        problems.append(Problem("data.reset_attention_mask", rule, "evaluate the checkpoint, or leave it out"))
    if problems:
        raise ConfigError(problems)
    check_files(cfg)
    return cfg


@torch.no_grad()
def _measure(cfg: Config, model: Any, loader: StepLoader, described: SourceModel) -> Metrics:
    """Runs all validation samples; one all-reduce at the end."""
    layers = model.model.layers
    device = next(model.parameters()).device
    sums = torch.zeros(2 + len(layers), dtype=torch.float64, device=device)  # loss, tokens, active neurons per layer
    counted: Tensor  # [b, s] of the micro-batch that runs

    def count(layer: int, activation: Tensor) -> None:
        sums[2 + layer] += ((activation != 0).sum(-1) * counted).sum()

    hooks = []
    if described.activation == "relu":
        for index, layer in enumerate(layers):
            hook = lambda _module, _inputs, output, index=index: count(index, output)  # noqa: E731
            hooks.append(layer.mlp.act_fn.register_forward_hook(hook))
    for _ in range(cfg.training.eval_steps):
        for batch in loader.next_step():
            counted = batch.loss_mask
            logits = model(input_ids=batch.tokens, use_cache=False).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            sums[0] += (losses.view_as(counted) * counted).sum()
            sums[1] += counted.sum()
    for handle in hooks:
        handle.remove()
    dist.all_reduce(sums)
    loss, tokens, *active = sums.tolist()
    return validation_metrics(loss, tokens, [value / tokens for value in active] if hooks and tokens else [])
