"""Comparing runs of `cases` under different parallel layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.launch import run_distributed
from tests.megatron.tiny_model import Arrays, assemble

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"parallel__tensor": 2}),
    "tp2-sp": (2, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
    "pp2": (2, {"parallel__pipeline": 2}),
    "pp2-interleaved": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "cp2": (2, {"parallel__context": 2}),
    "dp2": (2, {}),
    "tp2-sp-pp2": (4, {"parallel__tensor": 2, "parallel__sequence_parallel": True, "parallel__pipeline": 2}),
}
"""Name -> (ranks, configuration)."""


def run_gradients(
    layout: str, model: dict[str, Any] | None = None, step: dict[str, Any] | None = None, **config: Any
) -> tuple[float, Arrays]:
    """`cases.gradients` under a layout: the loss, and whole gradients by global name."""
    ranks, parallel = LAYOUTS[layout]
    target = "tests.megatron.cases:gradients"
    results = run_distributed(ranks, target, {**parallel, **config}, model or {}, step or {})
    return results[-1][0], assemble([shards for _, shards in results])


def assert_close(actual: Arrays, expected: Arrays, tolerance: float) -> None:
    """Every array within `tolerance` of the expected one's largest entry."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        scale = max(float(np.abs(want).max()), 1e-12)
        error = float(np.abs(actual[name] - want).max()) / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
