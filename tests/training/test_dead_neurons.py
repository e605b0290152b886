"""New rows of dead neurons fire as rarely as they should, whatever the mean input."""

from __future__ import annotations

import pytest
import torch

from megasparse.megatron.input_moments import InputMoments
from megasparse.training.dead_neurons import lean, normal_rows

WIDTH, TOKENS, STD = 512, 4096, 0.02


def inputs(strength: float) -> torch.Tensor:
    """Tokens of length about sqrt(WIDTH), a share `strength` of it along a common mean."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(WIDTH, generator=generator)
    scatter = torch.randn(TOKENS, WIDTH, generator=generator)
    return strength * mean + (1 - strength**2) ** 0.5 * scatter


def leaning_rows(x: torch.Tensor, rate: float) -> torch.Tensor:
    moments = InputMoments(WIDTH, "cpu")
    for part in x.view(4, 2, -1, WIDTH):
        moments.add(part)
    mean, square = InputMoments.read(moments.table)
    assert mean.tolist() == pytest.approx(x.mean(0).tolist(), abs=1e-5)
    assert square == pytest.approx(float(x.square().sum(1).mean()), rel=1e-5)
    return lean(normal_rows(7, torch.arange(400), WIDTH) * STD, STD, mean, square, rate)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("rate", [0.002, 0.01, 0.1])
def test_new_rows_fire_at_the_rate_asked_for(strength: float, rate: float) -> None:
    x = inputs(strength)
    fires = (x @ leaning_rows(x, rate).T > 0).float().mean(0)
    assert float(fires.mean()) == pytest.approx(rate, rel=0.15)
    assert float((fires > 0).float().mean()) > 0.97  # nearly all of them live


def test_rows_of_a_layer_without_a_mean_input_stay_bounded() -> None:
    x = inputs(0.0)
    rows = leaning_rows(x, 0.01)
    assert float(rows.norm(dim=1).max()) < 2 * STD * WIDTH**0.5
    assert torch.equal(lean(rows, STD, torch.zeros(WIDTH), 1.0, 0.01), rows)
