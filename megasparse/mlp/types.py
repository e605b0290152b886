"""What the sparse MLP returns and what it may add its weight gradients to."""

from typing import NamedTuple

from torch import Tensor

TOKEN_TILE = 128
"""Consecutive tokens whose active neurons are gathered together; `MLPStats.union` counts over them.

Tokens are in the order of the rows, or of one sequence where `sparse_mlp` is told of several in the rows."""


class MLPStats(NamedTuple):
    """What one call saw, as detached device tensors: reading them is the only host synchronisation.

    Tokens that `token_mask` leaves out count in none of these but `union`, `tiles` and `tile_counts`, which
    describe the work of the kernels and so cover all tokens. A tile is 128 consecutive tokens: of one sequence where
    `sparse_mlp` is given `sequences` of whole tiles, else of the rows.
    """

    counts: Tensor
    """int64 [4]: `tokens`, `active`, `union`, `tiles`."""
    fired: Tensor
    """bool [H]: the neuron was active for at least one counted token."""
    tile_counts: Tensor
    """int32 [H]: number of 128-token tiles in which the neuron is active (all tokens): how frequent it is."""

    @property
    def tokens(self) -> Tensor:
        """int64 []: counted tokens."""
        return self.counts[0]

    @property
    def active(self) -> Tensor:
        """int64 []: sum over counted tokens of the number of neurons with a non-zero gate."""
        return self.counts[1]

    @property
    def union(self) -> Tensor:
        """int64 []: sum over tiles of the number of neurons active for any of the tile's 128 tokens."""
        return self.counts[2]

    @property
    def tiles(self) -> Tensor:
        """int64 []: number of 128-token tiles."""
        return self.counts[3]


class MLPOutput(NamedTuple):
    """Result of `megasparse.mlp.sparse_mlp`."""

    y: Tensor
    """Like x."""
    l1: Tensor
    """fp32 [] (fp64 for fp64 input): sum over counted tokens and neurons of |h|; differentiable."""
    stats: MLPStats


class MainGrads(NamedTuple):
    """fp32 buffers that the backward adds the weight gradients to (Megatron's `main_grad`).

    Autograd then returns no gradient for the weights. Both have the shape of their weight and are contiguous.
    """

    w_in: Tensor
    w_down: Tensor
