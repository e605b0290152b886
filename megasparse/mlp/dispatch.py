"""Which path a layer runs, from what its own recent statistics say.

A router only ever sees numbers that every rank has (reduced over all ranks, some steps old), so every rank
takes the same decision and none waits for its GPU. Its state goes into the checkpoint.
"""

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

from megasparse.mlp.cuda import device_reason, note_dense

_log = logging.getLogger("megasparse.mlp")

Mode = Literal["auto", "dense", "sparse"]

# Cost of a forward + backward in units of one dense [M, D] x [D, H] product; the dense path has nine of them.
# Fitted to times of recorded layers on an H200 at M 16384, D 2048, H 5632 (tools/benchmark_mlp.py --profile), where
# it predicts 0.22, 0.46, 0.50, 0.95 of the dense path's time and 0.26, 0.44, 0.49, 0.95 was measured.
DENSE_COST = 9.0
FIXED_COST = 1.2
"""The gate product, and lists that do not depend on the pattern."""
EXPAND_COST = 0.9
"""Compact activations, written and read, at a union of all neurons."""
UNION_EFFICIENCY = 0.83
"""FLOP rate of the products over tile unions, relative to a dense product."""
WGRAD_EFFICIENCY = 0.72
"""The same for the weight gradients."""

ENTER_SPARSE, LEAVE_SPARSE = 0.95, 1.0
"""Predicted sparse / dense time below which a layer goes sparse, and above which it goes dense again."""


def predicted_ratio(union_fraction: float, ordered: bool) -> float:
    """Predicted time of the sparse path over the dense path's, forward + backward.

    `union_fraction` is the mean share of neurons active for any token of a 128-token tile. Five products
    (up, down, dh, both halves of dx) shrink to it. The three weight gradients shrink to the share of tokens
    that use any of 64 neighbouring neurons: about the same where neurons are ordered by frequency, about its
    square root in natural order (recorded layers: 0.26 -> 0.21 and 0.47, 0.30 -> 0.31 and 0.68, 0.66 -> 0.69 and 0.92).
    """
    share = min(max(union_fraction, 0.0), 1.0)
    token_share = share if ordered else math.sqrt(share)
    products = 5 * share / UNION_EFFICIENCY + 3 * token_share / WGRAD_EFFICIENCY
    return (FIXED_COST + EXPAND_COST * share + products) / DENSE_COST


class LayerRouter:
    """Chooses one layer's path, neuron order and saved capacity; host state only.

    Args:
        mode: "dense" and "sparse" fix the path; "auto" starts dense and follows the statistics.
        hidden: neurons on this rank (H).
        width: D.
        device, dtype: where the layer computes. In "auto" mode a layer stays dense where there are no
            kernels; on CUDA the reason is logged once. Asking may build the kernels.
        name: for the log.
    """

    def __init__(
        self,
        mode: Mode,
        hidden: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        name: str = "layer",
    ) -> None:
        if mode not in ("auto", "dense", "sparse"):
            raise ValueError(f"LayerRouter: mode is {mode!r}; it must be 'auto', 'dense' or 'sparse'")
        self.mode: Mode = mode
        self.hidden = hidden
        self.name = name
        self.path: Literal["dense", "sparse"] = "sparse" if mode == "sparse" else "dense"
        self.order: Tensor | None = None
        self.l0_bound: float | None = None
        device = torch.device(device)
        self._can_change = mode == "auto" and device.type == "cuda"
        if self._can_change and (reason := device_reason(device, dtype, width, hidden)) is not None:
            note_dense(reason)
            self._can_change = False

    def capacity(self, tokens: int) -> int | None:
        """Non-zeros to save for `tokens` tokens (`sparse_mlp`'s capacity); None before any statistics."""
        return None if self.l0_bound is None else math.ceil(self.l0_bound * tokens)

    def update(self, l0: float, union_fraction: float, tile_counts: Tensor | None = None) -> None:
        """Take statistics of some recent steps and decide what the next steps run.

        Args:
            l0: mean active neurons per token among `hidden` neurons. Same on every rank.
            union_fraction: mean over 128-token tiles of union / hidden. Same on every rank.
            tile_counts: `MLPStats.tile_counts` of this rank's neurons, summed over the same steps: sets
                `order`. May differ between ranks, as results depend on it by rounding only. Not synchronised.
        """
        if tile_counts is not None:
            if tile_counts.shape != (self.hidden,):
                raise ValueError(f"LayerRouter: tile_counts must be [{self.hidden}]; got {tuple(tile_counts.shape)}")
            self.order = torch.sort(tile_counts, descending=True, stable=True).indices.to(torch.int32)
        if not (math.isfinite(l0) and math.isfinite(union_fraction)):
            return
        self._bound_capacity(l0)
        if not self._can_change:
            return
        ratio = predicted_ratio(union_fraction, ordered=self.order is not None)
        path = self.path
        if path == "dense" and ratio < ENTER_SPARSE:
            path = "sparse"
        elif path == "sparse" and ratio > LEAVE_SPARSE:
            path = "dense"
        if path != self.path:
            _log.info(
                "%s: %s -> %s (L0 %.1f, union %.3f of %d neurons, predicted time %.2f of dense)",
                self.name, self.path, path, l0, union_fraction, self.hidden, ratio,
            )  # fmt: skip
            self.path = path  # type: ignore[assignment]

    def _bound_capacity(self, l0: float) -> None:
        """Room for half as much again as seen; shrinks only when half would do, so sizes rarely change."""
        wanted = min(float(self.hidden), math.ceil((1.5 * l0 + 8) / 16) * 16)
        if self.l0_bound is None or wanted > self.l0_bound or wanted <= 0.5 * self.l0_bound:
            self.l0_bound = wanted

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue bitwise. `order` belongs to this rank's neurons."""
        order = None if self.order is None else self.order.cpu()
        return {"path": self.path, "l0_bound": self.l0_bound, "order": order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. A fixed mode keeps its path; an order of another H is dropped."""
        if self._can_change:
            self.path = state["path"]
        self.l0_bound = state["l0_bound"]
        order = state["order"]
        self.order = order if order is not None and order.shape == (self.hidden,) else None
