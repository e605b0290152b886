"""What one layer's neurons did, accumulated on the device without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.mlp import MLPStats


class LayerStats:
    """Sums of one sparse MLP's `MLPStats`, for this rank's tokens and neurons. Of a step: the difference that it makes.

    Under tensor parallelism each rank holds its own neurons and sees the same tokens: `active`, `l1`, `union` add up
    over the tensor-parallel group, `tokens` and `tiles` are the same on all of it, per-neuron tensors are shards in
    order of rank. Over data- and context-parallel ranks all sums add up, `steps_since_fired` is the minimum.
    """

    def __init__(self, hidden: int, device: torch.device | str | int) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        """int64 [4]: `tokens`, `active`, `union`, `tiles`, side by side as `MLPStats` has them."""
        # Its elements, made once: a view costs the host as much as a launch.
        self.tokens, self.active, self.union, self.tiles = self.counts.unbind()
        """int64 [] each: counted tokens; sum over them of neurons with a non-zero gate; sum over 128-token tiles of the
        neurons active for any token of the tile; number of those tiles."""
        self.l1 = torch.zeros((), dtype=torch.float64, device=device)
        """fp64 []: sum over counted tokens and neurons of |h|."""
        self.tile_counts = torch.zeros(hidden, dtype=torch.int64, device=device)
        """int64 [H / tp]: 128-token tiles in which the neuron was active since the last `forget_tiles`: what
        `LayerRouter` orders neurons by."""
        self.fired = torch.zeros(hidden, dtype=torch.bool, device=device)
        """bool [H / tp]: the neuron fired for a counted token in the training step under way."""
        self.steps_since_fired = torch.zeros(hidden, dtype=torch.int32, device=device)
        """int32 [H / tp]: ended training steps since the neuron last fired."""

    @torch.no_grad()
    def add(self, stats: MLPStats, l1: Tensor, *, training: bool = True) -> None:
        """Count one micro-batch. `training` False (validation): it is no sign of life for dead-neuron counts."""
        self.counts += stats.counts
        self.l1 += l1.detach()
        self.tile_counts += stats.tile_counts
        if training:
            self.fired |= stats.fired

    @torch.no_grad()
    def end_step(self) -> None:
        """Advance `steps_since_fired`; call once after each optimizer step."""
        self.steps_since_fired += 1
        self.steps_since_fired.masked_fill_(self.fired, 0)
        self.fired.zero_()

    @torch.no_grad()
    def forget_step(self) -> None:
        """Instead of `end_step` where activations may have been infinite, or no token counted: `steps_since_fired`
        stays as it is."""
        self.fired.zero_()

    @torch.no_grad()
    def revive(self, neurons: Tensor) -> None:
        """Start `steps_since_fired` anew where `neurons` (bool [H / tp]) says so, after re-initialising them."""
        self.steps_since_fired.masked_fill_(neurons, 0)

    @torch.no_grad()
    def forget_tiles(self) -> None:
        """Start `tile_counts` anew, as how often neurons fire changes over a run."""
        self.tile_counts.zero_()
