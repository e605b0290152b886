"""Layer norms that need neither Transformer Engine nor Apex and work under sequence parallelism.

Megatron-Core's own PyTorch norm (`WrappedTorchNorm`) refuses sequence parallelism. All it takes is a mark on the
parameters: each tensor-parallel rank then normalises its part of the sequence only, so its gradient of the weight is
partial, and Megatron's `finalize_model_grads` sums those over the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm:
    """Builds the norm that `config.normalization` names ("RMSNorm" or "LayerNorm") as Megatron-Core's specs ask.

    Parameters are of `config.params_dtype` on Megatron's current device.

    Raises:
        ValueError: for another norm, or where gains are to be stored minus one.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma needs Transformer Engine's norm; use implementation: te")
        place: dict[str, Any] = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        norm: torch.nn.Module
        if config.normalization == "RMSNorm":
            norm = torch.nn.RMSNorm(hidden_size, eps=eps, **place)
        elif config.normalization == "LayerNorm":
            norm = torch.nn.LayerNorm(hidden_size, eps=eps, **place)
        else:
            raise ValueError(f"normalization is {config.normalization!r}; it must be 'RMSNorm' or 'LayerNorm'")
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
