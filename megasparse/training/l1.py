"""The L1 coefficient of every layer over time: constant with warm-up and decay, or steered to a target L0.

`constant` is the recipe of arXiv 2603.23198: one coefficient for all layers.

`target` gives every layer its own coefficient and steers it until the layer's L0 (active neurons per token, over the
whole global batch) meets `target_l0`. Once a step, with e = log(EMA of L0 / target):

    log coeff += gain * clip(e + LOOK_AHEAD * (e - e of the step before), -1, 1)

The L0 of a layer follows its coefficient only after tens of steps. Plain integral control (the first term) keeps
raising the coefficient all that while and then overshoots far below the target, which kills neurons for good. The
second term adds where L0 will be in LOOK_AHEAD steps at its present speed: the coefficient stops rising as soon as
L0 is falling fast enough.

A layer may stay below its target without any L1 term. Its coefficient then rests at `coeff` / REST, where the term has
next to no effect, instead of falling on and on: from there it is back in some tens of steps when the layer needs it.

Every rank computes the same coefficients, bit by bit: they follow from integer counts which are summed over the
whole job (`layer_stats.py`), in double precision, on the host. The counts of a step move the coefficients of the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megasparse.config import Config, L1Config

LOOK_AHEAD = 80.0
"""Steps. Near critical damping for responses of L0 within 30 to 200 steps at the default gain (tests)."""
EMA_DECAY = 0.9
"""Of the running mean of each layer's L0."""
REST = 20.0
"""`coeff` over the smallest coefficient of a steered layer."""
CEILING = 100.0
"""The largest coefficient of a steered layer over `coeff`: a target that needs more is out of reach."""


def constant_coefficient(l1: L1Config, step: int) -> float:
    """Coefficient of step `step` (1 is the first): zero before `start_step`, linear warm-up, linear decay."""
    if step < l1.start_step:
        return 0.0
    value = l1.coeff
    if l1.warmup_steps:
        value *= min(1.0, (step - l1.start_step) / l1.warmup_steps)
    if l1.decay_start_step is not None and step > l1.decay_start_step:
        share = min(1.0, (step - l1.decay_start_step) / l1.decay_steps) if l1.decay_steps else 1.0
        value += (l1.decay_to - l1.coeff) * share
    return value


class L1Controller:
    """The coefficients of all layers of the model, on every rank.

    Args:
        cfg: the run.
    """

    def __init__(self, cfg: Config) -> None:
        self._l1 = cfg.sparsity.l1
        layers = cfg.model.num_layers
        target = self._l1.target_l0
        self._targets = list(target) if isinstance(target, tuple) else [target or 1.0] * layers
        self._log_coeff = [math.log(self._l1.coeff)] * layers
        self._ema: list[float | None] = [None] * layers
        self._error: list[float | None] = [None] * layers
        self.coefficients: list[float] = [0.0] * layers
        """One a global layer, as set for the current step."""

    @property
    def needs_statistics(self) -> bool:
        """Whether the coefficients depend on the measured L0, every step."""
        return self._l1.mode == "target"

    def set_step(self, step: int, mlps: Sequence[Any]) -> None:
        """Computes the coefficients of step `step` and writes those of this rank's layers to the device."""
        if self._l1.mode == "off":
            return
        if self._l1.mode == "constant":
            coefficients = [constant_coefficient(self._l1, step)] * len(self.coefficients)
        elif step < self._l1.start_step:
            coefficients = [0.0] * len(self.coefficients)
        else:
            coefficients = [math.exp(value) for value in self._log_coeff]
        self.coefficients = coefficients
        with torch.no_grad():
            for mlp in mlps:
                mlp.l1_coeff.fill_(coefficients[mlp.layer_index])

    def update(self, step: int, l0: Sequence[float]) -> None:
        """Takes the measured L0 of every layer in step `step`; moves the coefficients of the next (`target`)."""
        if not self.needs_statistics:
            return
        lowest, highest = math.log(self._l1.coeff / REST), math.log(self._l1.coeff * CEILING)
        for layer, value in enumerate(l0):
            ema = self._ema[layer]
            ema = value if ema is None else EMA_DECAY * ema + (1.0 - EMA_DECAY) * value
            # A layer in which nothing fires has no logarithm; one neuron per million tokens stands for it.
            error = math.log(max(ema, 1e-6) / self._targets[layer])
            before = self._error[layer]
            speed = 0.0 if before is None else error - before
            self._ema[layer], self._error[layer] = ema, error
            if step >= self._l1.start_step:
                push = self._l1.gain * min(1.0, max(-1.0, error + LOOK_AHEAD * speed))
                self._log_coeff[layer] = min(highest, max(lowest, self._log_coeff[layer] + push))

    def state_dict(self) -> dict[str, Any]:
        """Everything that later coefficients depend on, the same on every rank."""
        return {"log_coeff": list(self._log_coeff), "ema": list(self._ema), "error": list(self._error)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state. Raises ValueError where the number of layers differs."""
        if len(state["log_coeff"]) != len(self._log_coeff):
            raise ValueError(
                f"the checkpoint steers {len(state['log_coeff'])} layers, the model has {len(self._log_coeff)}"
            )
        self._log_coeff = list(state["log_coeff"])
        self._ema = list(state["ema"])
        self._error = list(state["error"])
