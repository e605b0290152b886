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

# Time of a forward + backward relative to the dense path's nine products. Least squares (relative) over 47 cases on an
# H200: M 2048 to 65536, D 2048 to 8192, H 1408 to 28672, unions 0.06 to 1 (docs/benchmarks.md). Half of the cases lie
# within 5 %; the furthest are 0.43 where 0.33 is predicted (H 1408) and 1.00 where 0.80 is (H 28672).
FIXED_COST = 0.14
"""The gate product, which stays dense, and lists that do not depend on the pattern."""
UNION_COST = 0.99
"""The other eight products, the compact activations they pass on, and all that grows with a tile's union."""
LAUNCH_COST = 0.11
"""Ramp-up and launches of more kernels than the dense path has, as the size of a layer in TFLOP that costs as much."""


ENTER_SPARSE, LEAVE_SPARSE = 0.95, 1.0
"""Predicted sparse / dense time below which a layer goes sparse, and above which it goes dense again."""


def predicted_ratio(union_fraction: float, ordered: bool, tokens: int, width: int, hidden: int) -> float:
    """Predicted time of the sparse path over the dense path's, forward + backward of an [M, D] x [D, H] layer.

    `union_fraction` is the mean share of neurons active for any token of a 128-token tile. Five products
    (up, down, dh, both halves of dx) shrink to it. The three weight gradients shrink to the share of tokens
    that use any of 64 neighbouring neurons: about the same where neurons are ordered by frequency, about its
    square root in natural order (recorded layers: 0.26 -> 0.21 and 0.47, 0.30 -> 0.31 and 0.68, 0.66 -> 0.69 and 0.92).
    """
    share = min(max(union_fraction, 0.0), 1.0)
    if not ordered:
        share = (5 * share + 3 * math.sqrt(share)) / 8
    dense_tflop = 18e-12 * max(tokens, 1) * width * hidden
    return FIXED_COST + UNION_COST * share + LAUNCH_COST / dense_tflop


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
        self.width = width
        self.name = name
        self.path: Literal["dense", "sparse"] = "sparse" if mode == "sparse" else "dense"
        self.order: Tensor | None = None
        self.l0_bound: float | None = None
        self._device = torch.device(device)
        self._can_change = mode == "auto" and self._device.type == "cuda"
        if self._can_change and (reason := device_reason(self._device, dtype, width, hidden)) is not None:
            note_dense(reason)
            self._can_change = False

    def capacity(self, tokens: int) -> int | None:
        """Non-zeros to save for `tokens` tokens (`sparse_mlp`'s capacity); None before any statistics."""
        return None if self.l0_bound is None else math.ceil(self.l0_bound * tokens)

    def update(self, l0: float, union_fraction: float, tile_counts: Tensor | None = None, *, tokens: int) -> None:
        """Take statistics of some recent steps and decide what the next steps run.

        Args:
            l0: mean active neurons per token among `hidden` neurons. Same on every rank.
            union_fraction: mean over 128-token tiles of union / hidden. Same on every rank.
            tile_counts: `MLPStats.tile_counts` of this rank's neurons, summed over recent steps: sets
                `order`. May differ between ranks, as results depend on it by rounding only. Not synchronised.
            tokens: M of one call, on this rank.
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
        ratio = predicted_ratio(union_fraction, self.order is not None, tokens, self.width, self.hidden)
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
        same = order is not None and order.shape == (self.hidden,)
        self.order = order.to(self._device) if same else None
