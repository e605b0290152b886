"""Sparsity counts of every layer in one step, summed over the whole job.

Each rank puts the counts of its own layers, tokens and neurons into one table of integers; one all-reduce over all
ranks makes it the table of the model. It is started after the backward pass and read when the loss, which is reduced
after it, has been read: nobody waits for it, nor for the update in between. Integer sums do not depend on their order,
so every rank reads the same.

Under tensor parallelism neurons are sharded: `active` and `union` add up; tokens and tiles are the same on all
tensor-parallel ranks and are counted on the first alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

COUNTS = ("tokens", "active", "union", "tiles")
"""Columns of the table, as `LayerStats.counts` has them."""


class LayerCounts(NamedTuple):
    """Of one step: host lists, one entry a global layer."""

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
        device = self._mlps[0].recorder.counts.device if self._mlps else torch.cuda.current_device()
        # Made once: for an index from the host, the host would wait for all that the GPU has to do before.
        self._rows = torch.tensor([mlp.layer_index for mlp in self._mlps], dtype=torch.int64, device=device)
        self._before: torch.Tensor | None = None
        self._pending: tuple[torch.Tensor, Any] | None = None
        """The reduced table on the host, and the CUDA event after which it is there (None without CUDA)."""

    def begin(self) -> None:
        """Before a step that is measured: the recorders go on counting for others, so differences are taken."""
        self._before = self._table()

    def end(self) -> None:
        """After the backward pass of that step: starts the reduction. Nothing happens where it is not measured."""
        if self._before is not None:
            table = self._table() - self._before
            self._before = None
            dist.all_reduce(table)
            if table.is_cuda:
                # To the host behind the reduction, not behind the update, which `take` would otherwise wait for.
                host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
                host.copy_(table, non_blocking=True)
                self._pending = host, torch.cuda.current_stream().record_event()
            else:
                self._pending = table, None

    def take(self) -> LayerCounts | None:
        """The counts of the step that has ended; None where it was not measured."""
        if self._pending is None:
            return None
        table, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        rows = table.tolist()
        l0 = [active / tokens if tokens else 0.0 for tokens, active, _, _ in rows]
        union = [union / (tiles * self._width) if tiles else 0.0 for _, _, union, tiles in rows]
        return LayerCounts(l0, union)

    def _table(self) -> torch.Tensor:
        """int64 [layers, 4] of this rank's contributions; rows of other ranks' layers are zero."""
        table = torch.zeros(self._layers, len(COUNTS), dtype=torch.int64, device=self._rows.device)
        if self._mlps:
            values = torch.stack([mlp.recorder.counts for mlp in self._mlps])
            if not self._counts_tokens:
                values[:, 0::3] = 0  # tokens and tiles
            table.index_copy_(0, self._rows, values)
        return table
