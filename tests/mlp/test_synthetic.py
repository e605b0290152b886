"""Patterns made for benchmarks keep what they promise."""

import torch

from megasparse.mlp.synthetic import uniform, widen


def test_widened_pattern_keeps_density_and_unrelates_its_copies() -> None:
    pattern = torch.rand(1024, 96, generator=torch.Generator().manual_seed(0)) < 0.1
    wide = widen(pattern, 240)
    assert wide.shape == (1024, 240)
    assert torch.equal(wide[:, :96], pattern)
    assert torch.equal(wide[:, 96:192].sum(0), pattern.sum(0))
    assert not torch.equal(wide[:, 96:192], pattern)


def test_narrowed_pattern_is_the_first_columns() -> None:
    pattern = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) < 0.1
    assert torch.equal(widen(pattern, 40), pattern[:, :40])


def test_uniform_has_its_l0() -> None:
    x, w_gate = uniform(4096, 64, 512, 30, torch.Generator().manual_seed(0))
    l0 = (x @ w_gate.t() > 0).sum(1).float().mean()
    assert 28 < l0 < 32
