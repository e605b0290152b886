"""Sparsity counts of every layer, summed over the whole job, one step late and without a host wait.

Each rank puts the counts of its own layers, tokens and neurons into one table of integers; one all-reduce over all
ranks makes it the table of the model. It is started after the backward pass of a step and read after the next one.
Integer sums do not depend on their order, so every rank reads the same numbers.

Under tensor parallelism neurons are sharded: `active` and `union` add up; tokens and tiles are the same on all
tensor-parallel ranks and are counted on the first alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

COUNTS = ("tokens", "active", "tiles", "union")


class LayerCounts(NamedTuple):
    """Of one step: host lists, one entry a global layer."""

    step: int
    l0: list[float]
    """Active neurons per counted token; 0 where no token counted."""
    union_fraction: list[float]
    """Mean share of all neurons that are active for any token of a 128-token tile."""


class LayerCounter:
    """Measures the counts of a step.

    Args:
        mlps: this rank's SparseMLP modules.
        layers: layers of the whole model.
        width: neurons of a layer of the whole model.
    """

    def __init__(self, mlps: Sequence[Any], layers: int, width: int) -> None:
        self._mlps = list(mlps)
        self._layers, self._width = layers, width
        self._counts_tokens = parallel_state.get_tensor_model_parallel_rank() == 0
        self._before: torch.Tensor | None = None
        self._pending: tuple[int, torch.Tensor, Any] | None = None
        self._loaded: tuple[int, list[list[int]]] | None = None

    def begin(self) -> None:
        """Before a step that is measured: the recorders go on counting for others, so differences are taken."""
        self._before = self._table()

    def end(self, step: int) -> None:
        """After the backward pass of that step: starts the reduction."""
        assert self._before is not None, "begin() was not called before this step"
        table = self._table() - self._before
        self._before = None
        self._pending = (step, table, dist.all_reduce(table, async_op=True))

    def take(self) -> LayerCounts | None:
        """The counts whose reduction was started last, once; None where there are none."""
        raw = self._finish()
        if raw is None:
            return None
        step, rows = raw
        l0 = [active / tokens if tokens else 0.0 for tokens, active, _, _ in rows]
        union = [union / (tiles * self._width) if tiles else 0.0 for _, _, tiles, union in rows]
        return LayerCounts(step, l0, union)

    def _finish(self) -> tuple[int, list[list[int]]] | None:
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            return loaded
        if self._pending is None:
            return None
        step, table, work = self._pending
        self._pending = None
        work.wait()
        return step, table.tolist()

    def _table(self) -> torch.Tensor:
        """int64 [layers, 4] of this rank's contributions; rows of other ranks' layers are zero."""
        device = next(iter(self._mlps)).recorder.tokens.device if self._mlps else torch.cuda.current_device()
        table = torch.zeros(self._layers, len(COUNTS), dtype=torch.int64, device=device)
        if self._mlps:
            values = torch.stack([getattr(mlp.recorder, name) for mlp in self._mlps for name in COUNTS])
            values = values.view(len(self._mlps), len(COUNTS))
            if not self._counts_tokens:
                values[:, 0::2] = 0
            table[[mlp.layer_index for mlp in self._mlps]] = values
        return table

    def state_dict(self) -> dict[str, Any]:
        """Counts on their way, so that a resumed run uses them in the same step as an uninterrupted one."""
        self._loaded = self._finish()
        return {"pending": self._loaded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state["pending"]
