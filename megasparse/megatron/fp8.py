"""Attention projections in 8 bits, by Transformer Engine: what a machine must have for it, and its traces in a model.

Megatron-Core opens Transformer Engine's context around its layers (`fp8_utils.get_fp8_context`): around all of them
under delayed scaling, around each one under the other recipes. Inside, Transformer Engine's own linear modules quantise
their inputs, weights and gradients; the sparse MLP, the norms and the attention between the projections stay in bf16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megasparse.config import Config, ConfigError, Fp8Recipe, Problem
from megasparse.megatron.spec import NO_TRANSFORMER_ENGINE, have_transformer_engine


def missing(recipe: Fp8Recipe) -> str | None:
    """Why this process cannot train with a recipe: a clause, or None where it can."""
    if not have_transformer_engine():
        return f"needs {NO_TRANSFORMER_ENGINE}"
    from megatron.core import fp8_utils

    manager = fp8_utils.FP8GlobalStateManager  # Transformer Engine's, from where this version of it has it
    available, reason = manager.is_fp8_available()
    if available and recipe == "blockwise":
        available, reason = manager.is_fp8_block_scaling_available()
    return None if available else f"Transformer Engine cannot do it here: {reason.rstrip('.')}"


def fp8_options(cfg: Config) -> dict[str, Any]:
    """What `training.fp8` sets of a TransformerConfig; nothing where it is off.

    Raises:
        ConfigError: this machine cannot do it.
    """
    training = cfg.training
    if training.fp8 == "off":
        return {}
    reason = missing(training.fp8_recipe)
    if reason is not None:
        fix = "set training.fp8: off (bf16; checkpoints load either way)"
        if training.fp8_recipe == "blockwise" and missing("tensorwise") is None:
            fix = "set training.fp8_recipe: tensorwise or delayed"
        problem = Problem("training.fp8", f"{training.fp8_recipe} scaling {reason}", fix, training.fp8)
        raise ConfigError([problem], host_specific=True)
    return {"fp8": training.fp8, "fp8_recipe": training.fp8_recipe}


@contextmanager
def amax_kept(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Delayed scaling notes the largest values of every forward, of validation too, and scales the next step by them.
    This puts back what training noted, so that it goes on as if there had been no validation."""
    noted = [(history, history.clone()) for history in _amax_histories(chunks)]
    try:
        yield
    finally:
        for history, value in noted:
            history.copy_(value)


def _amax_histories(chunks: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    for chunk in chunks:
        for module in chunk.modules():
            history = getattr(getattr(module, "fp8_meta", {}).get("scaling_fwd"), "amax_history", None)
            if isinstance(history, Tensor):
                yield history
