"""Per-layer sparsity of the whole model, from what each rank's layers counted in one step.

A layer's neurons are spread over the tensor-parallel ranks, its tokens over data- and context-parallel ranks, layers
over pipeline ranks. Every rank writes what it alone knows into a table of the whole model, zero elsewhere; one sum over
all ranks (which the caller does, together with its other figures) is then reduction and gathering at once:

- active neurons, |h| and unions add up over all ranks that hold a part of the layer;
- tokens and tiles are the same on all tensor-parallel ranks, so the first of them alone writes them;
- a neuron is dead when it is dead on every data- and context-parallel rank: one small collective over those settles
  it, and the first of them writes the number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

if TYPE_CHECKING:
    from megasparse.megatron.sparse_mlp import SparseMLP

_SUMS = ("tokens", "active", "l1", "union", "tiles")
COLUMNS = len(_SUMS) + 2
"""Of the table: `_SUMS`, dead neurons, 1 on the sparse path."""


class LayerSparsity(NamedTuple):
    """One layer over one global batch."""

    l0: float
    """Active neurons per counted token; NaN where no token counted."""
    l1: float
    """Mean over counted tokens of the sum over neurons of |h|; NaN where no token counted."""
    dead_fraction: float
    union_fraction: float
    """Mean share of the neurons active for any token of a 128-token tile; NaN without tokens."""
    path: str
    """"dense" or "sparse"."""


class SparsityMeter:
    """Measures one step: `begin` before it, `table` after it."""

    def __init__(self, mlps: Sequence[SparseMLP], num_layers: int, width: int) -> None:
        """`mlps`: this rank's. `num_layers`, `width` (neurons of a layer): of the whole model."""
        self._mlps = list(mlps)
        self._num_layers, self._width = num_layers, width
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._first_of_data = self._group.rank() == 0
        self._first_of_tensor = parallel_state.get_tensor_model_parallel_rank() == 0
        self._before: Tensor | None = None

    def begin(self) -> None:
        """Note the sums so far; what `table` returns counts from here."""
        for mlp in self._mlps:
            mlp.recorder.l1.nan_to_num_(0.0, 0.0, 0.0)  # one step that was not finite would leave it so for ever
        self._before = self._sums()

    def table(self, window: int) -> Tensor:
        """float64 [num_layers, COLUMNS] of this rank's contributions, on the recorders' device. Collective.

        `window`: steps without firing after which a neuron is dead.
        """
        if not self._mlps:
            return torch.zeros(self._num_layers, COLUMNS, dtype=torch.float64, device=torch.cuda.current_device())
        sums = self._sums()
        if self._before is not None:
            sums = sums - self._before
        if not self._first_of_tensor:
            sums[:, [_SUMS.index("tokens"), _SUMS.index("tiles")]] = 0
        dead = torch.stack([mlp.recorder.steps_since_fired >= window for mlp in self._mlps]).to(torch.uint8)
        if self._group.size() > 1:
            dist.all_reduce(dead, op=dist.ReduceOp.MIN, group=self._group)
        state = torch.zeros(len(self._mlps), 2, dtype=torch.float64, device=sums.device)
        if self._first_of_data:
            state[:, 0] = dead.sum(dim=1)
            if self._first_of_tensor:
                state[:, 1] = torch.tensor([float(mlp.router.path == "sparse") for mlp in self._mlps])
        table = torch.zeros(self._num_layers, COLUMNS, dtype=torch.float64, device=sums.device)
        table[[mlp.layer_index for mlp in self._mlps]] = torch.cat([sums, state], dim=1)
        return table

    def read(self, table: Sequence[Sequence[float]]) -> list[LayerSparsity]:
        """`table` summed over all ranks, as host numbers -> one entry a global layer."""
        result = []
        for tokens, active, l1, union, tiles, dead, sparse in table:
            result.append(
                LayerSparsity(
                    l0=active / tokens if tokens else math.nan,
                    l1=l1 / tokens if tokens else math.nan,
                    dead_fraction=dead / self._width,
                    union_fraction=union / (tiles * self._width) if tiles else math.nan,
                    path="sparse" if sparse else "dense",
                )
            )
        return result

    def metrics(self, layers: Sequence[LayerSparsity]) -> dict[str, float | str]:
        """The `sparsity/layer_{i}/...` metrics."""
        result: dict[str, float | str] = {}
        for index, layer in enumerate(layers):
            result[f"sparsity/layer_{index}/l0"] = layer.l0
            result[f"sparsity/layer_{index}/l1"] = layer.l1
            result[f"sparsity/layer_{index}/density"] = layer.l0 / self._width
            result[f"sparsity/layer_{index}/dead_fraction"] = layer.dead_fraction
            result[f"sparsity/layer_{index}/union_fraction"] = layer.union_fraction
            result[f"sparsity/layer_{index}/path"] = layer.path
        return result

    def _sums(self) -> Tensor:
        """float64 [local layers, len(_SUMS)]; whole numbers stay exact up to 2^53."""
        if not self._mlps:
            return torch.zeros(0, len(_SUMS), dtype=torch.float64)
        values = [getattr(mlp.recorder, name).double() for mlp in self._mlps for name in _SUMS]
        return torch.stack(values).view(len(self._mlps), len(_SUMS))


def l1_loss(layers: Sequence[LayerSparsity], coefficients: Sequence[float]) -> float:
    """The L1 term as it enters the loss: mean over layers of coefficient times mean over tokens of sum |h|."""
    terms = [layer.l1 * coeff if coeff else 0.0 for layer, coeff in zip(layers, coefficients, strict=True)]
    return sum(terms) / len(terms)
