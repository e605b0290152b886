"""Tokens a second, model FLOPs, and the share of the GPU's peak that they make."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megasparse.config import Config

# Dense bf16 tensor-core peaks in TFLOP/s, without structured sparsity (data sheets quote twice as much with it);
# longest matching name wins. Source: NVIDIA's data sheets.
PEAK_BF16_TFLOPS: dict[str, float] = {
    "A10": 125.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "H20": 148.0,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.4,
    "H800 PCIe": 756.0,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "GH200": 989.4,
    "B100": 1750.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "GB300": 2500.0,
}


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU as `torch.cuda.get_device_name` names it; None where unknown."""
    best: str | None = None
    for name in PEAK_BF16_TFLOPS:
        # Whole words: "A10" is not "A100", "L4" not "L40S", "H200" not "GH200".
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", device_name) and (
            best is None or len(name) > len(best)
        ):
            best = name
    return None if best is None else PEAK_BF16_TFLOPS[best] * 1e12


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs (2 per multiply-add) of one token's forward pass in the *dense-equivalent* model.

    Only matrix products count; a zero counts like any number, so that runs of different sparsity compare.
    Attention is causal: a token of a sequence of S attends to (S + 1) / 2 keys on average.
    """

    attention: float
    """Projections, scores and their product with the values, all layers."""
    mlp_per_layer: float
    mlp_layers: int
    head: float
    """The output projection onto the padded vocabulary."""
    gated: bool

    @property
    def forward(self) -> float:
        return self.attention + self.mlp_per_layer * self.mlp_layers + self.head

    @property
    def training(self) -> float:
        """Forward and backward: each product has two in the backward. Recomputation does not count."""
        return 3.0 * self.forward

    def executed_training(self, union_fractions: Sequence[float]) -> float:
        """Like `training`, with the products that the sparse path shrinks counted at their share of the neurons.

        Args:
            union_fractions: one a layer: mean share of the neurons that a token tile's union holds; 1.0 where dense.

        The gate product (non-gated: the input product) stays dense; of 9 (non-gated: 6) products the others shrink.
        """
        products = 9 if self.gated else 6
        mlp = sum((1 + (products - 1) * union) / products for union in union_fractions)
        return 3.0 * (self.attention + self.head + self.mlp_per_layer * mlp)


def model_flops(cfg: Config) -> ModelFlops:
    """FLOPs a token of the configured model, at `data.sequence_length`."""
    model, length = cfg.model, cfg.data.sequence_length
    queries = model.num_attention_heads * model.head_width
    keys_values = 2 * model.query_groups * model.head_width
    projections = 2 * model.hidden_size * (queries + keys_values) + 2 * queries * model.hidden_size
    scores = 2 * 2 * queries * (length + 1) / 2
    return ModelFlops(
        attention=model.num_layers * (projections + scores),
        mlp_per_layer=2 * (3 if model.gated else 2) * model.hidden_size * model.ffn_hidden_size,
        mlp_layers=model.num_layers,
        head=2 * model.hidden_size * cfg.padded_vocab_size(),
        gated=model.gated,
    )


class Throughput:
    """Turns tokens and seconds of a window of steps into metrics."""

    def __init__(self, cfg: Config, world_size: int, device_name: str | None = None) -> None:
        """`device_name`: the GPU; None: the current CUDA device's, if any."""
        if device_name is None and torch.cuda.is_available():
            device_name = torch.cuda.get_device_name()
        self.flops = model_flops(cfg)
        self.world_size = world_size
        self.peak = None if device_name is None else peak_bf16_flops(device_name)

    def metrics(self, tokens: int, seconds: float, union_fractions: Sequence[float]) -> dict[str, float]:
        """Args: `tokens` of the whole job within `seconds` of wall clock. MFU only where the peak is known."""
        if tokens <= 0 or seconds <= 0:
            return {}
        rate = tokens / seconds
        per_gpu = rate / self.world_size
        result = {
            "throughput/tokens_per_second": rate,
            "throughput/tokens_per_second_per_gpu": per_gpu,
            "throughput/tflops_per_gpu": per_gpu * self.flops.training / 1e12,
            "perf/executed_tflops_per_gpu": per_gpu * self.flops.executed_training(union_fractions) / 1e12,
        }
        if self.peak is not None:
            result["throughput/mfu"] = per_gpu * self.flops.training / self.peak
        return result
