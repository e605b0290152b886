"""The layout of the published sparse checkpoints (arXiv 2603.23198), as the code that writes and reads them defines it
(SakanaAI/sparser-faster-llms: `custom_models/sparse_models.py`, `sparse_testing_utils.py`)."""

from __future__ import annotations

import re

SUFFIX = "_sparse_relu"
"""Of their model types: `llama_sparse_relu`, `qwen2_sparse_relu`."""

AUXILIARY = re.compile(r"(^|\.)(tracker|metrics_accumulator)\.|\.rotary_emb\.inv_freq$")
"""Entries of state dicts that are no weights: statistics of their training, old rotary buffers."""


def other_names(name: str, gated: bool) -> list[tuple[str, bool]]:
    """Names under which their inference kernels keep the weight of an MLP, each with whether it is transposed there.

    Args:
        name: of a tensor in the stock architecture, such as `model.layers.0.mlp.down_proj.weight`.
    """
    prefix, dot, last = name.partition(".mlp.")
    suffixes = {
        "gate_proj.weight": [("gate_weight", True), ("GATE", False)],
        "up_proj.weight": [("up_weight", not gated), ("UP", False)],
        "down_proj.weight": [("down_weight", True), ("DOWN", True)],
    }
    return [(prefix + dot + suffix, transposed) for suffix, transposed in suffixes.get(last, [])]
