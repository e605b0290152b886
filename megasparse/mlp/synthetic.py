"""Inputs whose gate has a given pattern of active neurons, for benchmarks and tests of the kernels.

A pattern recorded from a model says which neurons fired for which token, not the activations behind it. `fit` finds
tokens and gate rows that reproduce it: a small logistic regression of rank D, which a pattern that a model of the
same width produced always has a solution to.
"""

from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor


def load_pattern(path: Path, hidden: int) -> Tensor:
    """bool [M, hidden] (fewer columns if it has fewer) from an .npz whose array `a` holds it as packed bits."""
    import numpy as np

    with np.load(path) as archive:
        return torch.from_numpy(np.unpackbits(archive["a"], axis=1)[:, :hidden].astype(bool))


def widen(pattern: Tensor, hidden: int) -> Tensor:
    """bool [M, hidden] from [M, H]: copies of the pattern side by side, each shifted by another stretch of tokens.

    Density and union share stay those of the recorded layer; neurons of different copies are unrelated.
    """
    copies = -(-hidden // pattern.shape[1])
    shift = len(pattern) // copies
    return torch.cat([pattern.roll(copy * shift, 0) for copy in range(copies)], 1)[:, :hidden]


def uniform(tokens: int, width: int, hidden: int, l0: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [M, D] and W_gate [H, D], fp32, whose gate is active independently with probability l0 / hidden."""
    device = generator.device
    x = torch.randn(tokens, width, device=device, generator=generator)
    w_gate = torch.randn(hidden, width, device=device, generator=generator) / (width - 1) ** 0.5
    x[:, 0] = 1  # column 0 of the weight becomes a bias
    w_gate[:, 0] = NormalDist().inv_cdf(l0 / hidden)
    return x, w_gate


def fit(pattern: Tensor, width: int, generator: torch.Generator, steps: int = 300) -> tuple[Tensor, Tensor]:
    """x [M, D] and W_gate [H, D], fp32, whose gate is active where `pattern` bool [M, H] is.

    Both keep the scale of normal inputs and of an initialised layer, so that products round as in a model. A few
    entries in a million may come out differently: check the pattern that results, not the one wished for.
    """
    device = generator.device
    tokens, hidden = pattern.shape
    x = torch.randn(tokens, width, device=device, generator=generator)
    w_gate = torch.randn(hidden, width, device=device, generator=generator) / width**0.5
    x[:, 0] = 4
    w_gate[:, 0] = -0.6
    wanted = pattern.to(device)
    sign = torch.where(wanted, 1.0, -1.0)
    weight = torch.where(wanted, 20.0, 1.0)  # active entries are rare
    parameters = [x.requires_grad_(), w_gate.requires_grad_()]
    rates = [0.05, 0.05 / width**0.5]
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)])
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        gate = (x.bfloat16() @ w_gate.bfloat16().t()).float()
        margin = torch.relu(0.25 - gate * sign)
        loss = (weight * margin * margin).sum() / tokens
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return x.detach(), w_gate.detach()
