"""CUDA graphs of the attention part, as far as a CPU goes: what is known before they are captured. That they change
nothing is tests/training/test_gpu.py's."""

from __future__ import annotations

import pytest
import torch

from megasparse.megatron.attention_graphs import _alias, _exchanged
from tests.launch import run_distributed
from tests.megatron.helpers import LAYOUTS, assert_close, run_gradients
from tests.megatron.tiny_model import assemble


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("one", [[1] * 4]), ("pp2", [[2, 2], [1, 1]]), ("pp2-interleaved", [[4, 2], [3, 1]])],
)
def test_counts_micro_batches_in_flight(layout: str, expected: list[list[int]]) -> None:
    """One pair of graphs for each: of four micro-batches, those that a pipeline's schedule has under way at a time."""
    ranks, parallel = LAYOUTS[layout]
    results = run_distributed(ranks, "tests.megatron.cases:attention_in_flight", parallel)
    assert [[most for most, _ in counts] for counts, _ in results] == expected
    assert all(left == 0 for counts, _ in results for _, left in counts)
    assert_close(assemble([shards for _, shards in results]), run_gradients(layout)[1], 0.0)


def test_an_alias_stands_in_for_a_parameter() -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.weight.main_grad = torch.zeros(2, 3)  # type: ignore[assignment]
    layer.weight.grad_added_to_main_grad = True  # type: ignore[assignment]
    own, alias = layer.weight, _alias(layer.weight)
    assert alias.main_grad is own.main_grad
    assert not alias.grad_added_to_main_grad
    with _exchanged([layer], {own: alias}):
        (gradient,) = torch.autograd.grad(layer(torch.ones(1, 3)).sum(), [alias])
    assert torch.equal(gradient, torch.ones(2, 3))
    assert layer.weight is own
    assert own.grad is None
    with torch.no_grad():
        alias.fill_(2.0)
    assert (own == 2).all()
