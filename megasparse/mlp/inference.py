"""The forward of the sparse path without gradients, and from how many tokens it is faster than dense products.

With few tokens, dense products win: they are bound by reading weights, and the ten kernels of the sparse path by their
own latency.
"""

from torch import Tensor

from megasparse.mlp.sparse import sparse_forward

NEVER = 1 << 30

# Time of the forward over that of dense products, which take 6 M D H FLOPs. Fitted on an H200 to recorded layers with
# unions of 0.07 to 0.66 of H at M 1024 to 16384, D 2048, H 5632 (tools/benchmark_inference.py --routes): it predicts
# 1.13, 0.76, 0.57, 0.43 at union 0.07, M 1024, 2048, 4096, 16384, and 1.21, 0.79, 0.60, 0.42 was measured; at union
# 0.66 it predicts 1.20, 1.02, 0.87 at M 2048, 4096, 16384, and 1.19, 1.00, 0.86 was measured.
FIXED_RATIO, UNION_RATIO = 0.33, 0.75
LAUNCH_FLOPS = 5.3e10
"""Latency of the launches and lists, 80 us, in FLOPs of a dense product in that time."""
ENTER = 0.95
"""Predicted sparse / dense time below which a call runs sparse."""


def sparse_inference(x: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """y [M, D] of `sparse_mlp(x, w_in, w_down, path="sparse")`, M > 0, nothing saved for a backward."""
    return sparse_forward(x, w_in, w_down, None, None, 1, False, 0, None, None)[0]


def fewest_tokens(union_fraction: float, width: int, hidden: int) -> int:
    """Tokens of a call from which a layer runs sparse: a power of two, so that layers seldom differ and what
    torch.compile made for one serves the others; NEVER where dense products are always faster.

    Args:
        union_fraction: mean share of neurons active for any of 128 consecutive tokens.
        width, hidden: D and H.
    """
    saved = ENTER - FIXED_RATIO - UNION_RATIO * union_fraction
    if saved <= 0:
        return NEVER
    tokens = LAUNCH_FLOPS / (6 * width * hidden * saved)
    return min(NEVER, max(256, 1 << max(0, int(tokens) - 1).bit_length()))
