"""Times of one MLP layer by number of tokens: what the constants of `megasparse/mlp/inference.py` are fitted to.

For every recorded layer: dense products as transformers has them, the same with the down weight stored by neuron, and
the sparse path. Microseconds, each in a CUDA graph over several copies of the weights, so that none is found in the L2
cache. Up to 64 tokens are drawn far apart, as a batch decodes them; more are consecutive.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from megasparse.mlp.inference import fewest_tokens, sparse_inference

COPIES = 6
TOKENS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)


def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(torch.relu(linear(x, gate)) * linear(x, up), down)


def microseconds(function: Callable[[int], Any], repeats: int = 15) -> float:
    """Median time of `function(copy)` in a graph of one call for each copy."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for copy in range(2):
            function(copy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function(copy) for copy in range(COPIES)]
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / COPIES)
    del kept
    return sorted(times[2:])[repeats // 2]


def measure_routes(recorded: dict[float, tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """A row for each layer and number of tokens."""
    rows = []
    compiled = torch.compile(dense, dynamic=False)
    for depth, (inputs, w_gate) in recorded.items():
        hidden, width = w_gate.shape
        x = inputs.bfloat16()
        generator = torch.Generator(x.device).manual_seed(0)
        w_up = torch.randn(hidden, width, device=x.device, generator=generator) / width**0.5
        w_down = torch.randn(hidden, width, device=x.device, generator=generator).bfloat16() / hidden**0.5
        w_in = torch.cat([w_gate.bfloat16(), w_up.bfloat16()])
        w_ins, w_downs = ([weight.clone() for _ in range(COPIES)] for weight in (w_in, w_down))
        gates, ups = zip(*(weight.chunk(2) for weight in w_ins), strict=True)
        transposed = [weight.t() for weight in w_downs]
        downs = [weight.t().contiguous() for weight in w_downs]
        active = x @ gates[0].t() > 0
        l0 = float(active.sum() / len(x))
        tiles = active[: len(x) // 128 * 128].view(-1, 128, hidden).any(1)
        union = float(tiles.float().mean())
        fewest = fewest_tokens(union, width, hidden)
        for tokens in TOKENS:
            if tokens > len(x):
                continue
            decoding = tokens <= 64
            chosen = torch.arange(tokens, device=x.device) * (len(x) // tokens if decoding else 1)
            part = x[chosen].contiguous()

            def run_dense(i: int, down: list[Tensor], part: Tensor = part) -> Tensor:
                return compiled(part, gates[i], ups[i], down[i])  # noqa: B023

            row = {
                "depth": depth,
                "l0": l0,
                "union_128": union,
                "tokens": tokens,
                "union": float(active[chosen].any(0).float().mean()),
                "route": "sparse" if tokens >= fewest else "dense",
                "dense_us": microseconds(lambda i: run_dense(i, downs)),  # noqa: B023
                "dense_by_neuron_us": microseconds(lambda i: run_dense(i, transposed)),  # noqa: B023
                "sparse_us": microseconds(lambda i: sparse_inference(part, w_ins[i], w_downs[i])),  # noqa: B023
            }
            rows.append(row)
    return rows


def print_routes(rows: list[dict[str, Any]]) -> None:
    print("layer      L0  union  tokens  union |   dense  by neuron  sparse us | sparse of dense | route")
    for row in rows:
        print(
            f"{row['depth']:5.2f} {row['l0']:7.1f}  {row['union_128']:.3f} {row['tokens']:7d}  {row['union']:.3f} | "
            f"{row['dense_us']:7.1f} {row['dense_by_neuron_us']:10.1f} {row['sparse_us']:10.1f} | "
            f"{row['sparse_us'] / row['dense_us']:15.2f} | {row['route']}"
        )
