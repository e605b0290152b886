"""Which path a layer runs at inference, by the number of tokens of a call, from what its own tokens say.

Prefill and decoding are bound by different things. With many tokens a product is bound by FLOPs, and the sparse path
of training (`sparse.py`) skips those of inactive neurons. With few it is bound by reading weights, and `decode.py` does
not read those of inactive neurons. In between, dense products are fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.mlp import decode
from megasparse.mlp.sparse import sparse_forward

NEVER = 1 << 30

# Forward of the sparse path over that of dense products, at M 16384, D 2048, H 5632 on an H200: 0.436, 0.570, 0.601,
# 0.748, 0.885 at unions of 0.073, 0.263, 0.298, 0.501, 0.664 of H (docs/benchmarks.md); this line gives 0.435, 0.580,
# 0.606, 0.761, 0.885.
FORWARD_RATIO, FORWARD_RATIO_PER_UNION = 0.38, 0.76
FIXED_FLOPS = 3e10
"""What a call's ten launches and its lists cost, in FLOPs of a dense product in the same time."""
DECODE_UNION = 0.6
"""Share of neurons used by any token of the call up to which `decode_mlp` is taken to be faster than dense products."""
ENTER = 0.95
"""Predicted sparse / dense time below which a call runs sparse."""


@dataclass(frozen=True)
class Route:
    """Which calls of a layer do not run dense. Both are powers of two, so that layers seldom differ and a graph that
    torch.compile makes of one serves the others."""

    decode_upto: int
    """Most tokens that `decode_mlp` computes; 0: none."""
    sparse_from: int
    """Fewest tokens that the sparse path computes; NEVER: none."""

    @staticmethod
    def of(l0: float, union_fraction: float, width: int, hidden: int) -> Route:
        """The route of a layer from its statistics.

        Args:
            l0: mean active neurons per token.
            union_fraction: share of neurons active for any of 128 consecutive tokens. Tokens of different sequences,
                which a batch that decodes is made of, share neurons as much (recorded layers, 64 tokens drawn at
                random: 0.08, 0.25, 0.33, 0.79; 128 in a row: 0.07, 0.26, 0.30, 0.66).
            width, hidden: D and H.
        """
        decode_upto = 0
        for tokens in (1, 2, 4, 8, 16, 32, 64):
            if min(union_fraction, tokens * l0 / hidden) <= DECODE_UNION:
                decode_upto = tokens
        saved = ENTER - FORWARD_RATIO - FORWARD_RATIO_PER_UNION * union_fraction
        if saved <= 0:
            return Route(decode_upto, NEVER)
        fewest = FIXED_FLOPS / (6 * width * hidden * saved)
        return Route(decode_upto, max(256, 1 << max(0, int(fewest) - 1).bit_length()))


DENSE = Route(0, NEVER)


def sparse_inference(x: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """y [M, D] by the sparse path, without gradients: `sparse_mlp(...).y`."""
    return sparse_forward(x, w_in, w_down, None, None, False, 0, None, None)[0]


def decode_applies(x: Tensor) -> bool:
    """Whether `decode_mlp` can run on x, and where: in a CUDA graph or compiled.

    Launched one by one from Python, three Triton kernels cost the host more than three dense products, and the host
    is what decoding then waits for.
    """
    if not decode.AVAILABLE or not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
