#!/usr/bin/env python3
"""Times, memory and errors of one MLP layer: dense eager, dense torch.compile, and megasparse's two paths.

    python tools/benchmark_mlp.py                                   uniform random patterns
    python tools/benchmark_mlp.py --patterns DIR                    and the recorded ones in DIR/*.npz
    python tools/benchmark_mlp.py --capture runs/NAME               and every layer of a checkpoint, on its data
    python tools/benchmark_mlp.py --sequences 8                     rows as in [s, 8, D]: tokens of a tile are strided
    python tools/benchmark_mlp.py --peer CHECKOUT                   and the published kernels (arXiv 2603.23198)
    python tools/benchmark_mlp.py --shape 16384,4096,14336 --shape 2048,2048,5632 --l0 60 --profile

Needs a GPU of compute capability 9.0. Each case draws a layer in bf16; `dense` is down(relu(gate(x)) * up(x)) with the
L1 term. Times are medians over `--repeats` calls by CUDA events, between a forward and a forward + backward that
leaves bf16 gradients of x and all weights. `saved` is what autograd keeps beside x and the weights, `peak` what the
allocator adds at most. Errors are ||out - fp64|| / ||fp64|| of y, dx, dW_gate, dW_up, dW_down. Writes results.json
and results.png to `--out`. Of the layers of a checkpoint, the sums over layers too; `auto` there gives each layer the
path that the router would choose.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megasparse.mlp import LayerRouter, device_reason, sparse_mlp, synthetic
from megasparse.mlp.dispatch import ENTER_SPARSE, predicted_ratio
from megasparse.mlp.token_order import by_position, tiled_sequences
from megasparse.monitoring.environment import describe_environment

L1_WEIGHT = 1e-6
OUTPUTS = ("y", "dx", "dw_gate", "dw_up", "dw_down")


def dense(x: Tensor, w_in: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """What is compared with: three products as a model writes them, and the L1 sum."""
    w_gate, w_up = w_in.chunk(2)
    h = torch.relu(x @ w_gate.t()) * (x @ w_up.t())
    return h @ w_down, h.abs().sum(dtype=torch.float32)


class Layer:
    """One case: tensors, and what its pattern says."""

    def __init__(
        self, name: str, x: Tensor, w_in: Tensor, w_down: Tensor, generator: torch.Generator, sequences: int
    ) -> None:
        """x [M, D] is in order of time; the rows of the layer's input are those of [M / sequences, sequences, D]."""
        self.name = name
        self.sequences = sequences
        x = by_position(x, sequences)
        self.leaves = [tensor.bfloat16().contiguous().requires_grad_() for tensor in (x, w_in, w_down)]
        self.dy = torch.randn(x.shape, device=x.device, generator=generator).bfloat16()
        with torch.no_grad():
            stats = sparse_mlp(*self.leaves, sequences=sequences).stats
        hidden, tokens = w_down.shape[0], x.shape[0]
        self.l0 = int(stats.active) / tokens
        self.union_fraction = int(stats.union) / int(stats.tiles) / hidden
        router = LayerRouter("sparse", hidden, x.shape[1])
        router.update(self.l0, self.union_fraction, stats.tile_counts, tokens=tokens)
        self.order, self.capacity = router.order, router.capacity(tokens)
        self.dense_bytes = 3 * tokens * hidden * 2


def cases(arguments: argparse.Namespace, tokens: int, width: int, hidden: int) -> Iterator[Layer]:
    """The cases of one shape. A wider layer than the recorded one is made of it and of it shifted in time."""
    generator = torch.Generator("cuda").manual_seed(0)

    def weights(w_gate: Tensor) -> tuple[Tensor, Tensor]:
        w_up = torch.randn(hidden, width, device="cuda", generator=generator) / width**0.5
        return torch.cat([w_gate, w_up]), torch.randn(hidden, width, device="cuda", generator=generator) / hidden**0.5

    for l0 in arguments.l0:
        x, w_gate = synthetic.uniform(tokens, width, hidden, l0, generator)
        yield Layer(f"uniform {l0:g}", x, *weights(w_gate), generator, arguments.sequences)
    for path in sorted(arguments.patterns.glob("*.npz")) if arguments.patterns else []:
        pattern = synthetic.widen(synthetic.load_pattern(path, hidden), hidden)
        pattern = pattern.repeat(-(-tokens // len(pattern)), 1)[:tokens]
        x, w_gate = synthetic.fit(pattern, width, generator)
        yield Layer(path.stem, x, *weights(w_gate), generator, arguments.sequences)

    if arguments.capture:
        for index, (x, w_in, w_down) in sorted(captured(arguments.capture, tokens).items()):
            if (x.shape[1], w_down.shape[0]) == (width, hidden):
                yield Layer(f"captured {index}", x, w_in, w_down, generator, arguments.sequences)


def captured(run: Path, tokens: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Input and weights of every (gated) sparse MLP of a checkpoint while it is validated on its own data.

    Tokens come sequence after sequence.
    """
    from megasparse.megatron import SparseMLP
    from megasparse.training.evaluate import evaluate

    inputs: dict[int, list[Tensor]] = {}
    weights: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, SparseMLP):
            kept = inputs.setdefault(module.layer_index, [])
            if sum(map(len, kept)) < tokens:
                kept.append(arguments[0].detach().transpose(0, 1).flatten(0, -2).clone())
            weights[module.layer_index] = (
                module.linear_fc1.weight.detach().clone(),
                module.linear_fc2.weight.detach().clone(),
            )

    handle = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        evaluate(run, ["training.eval_steps=1"])
    finally:
        handle.remove()
    return {index: (torch.cat(kept)[:tokens], *weights[index]) for index, kept in inputs.items()}


def milliseconds(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and 10th to 90th percentile of the device time of one call."""
    for _ in range(3):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    # A queue of work in front of the first call, so that launches never wait for the host.
    torch.cuda._sleep(20_000_000)
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return {"median": statistics.median(times), "p10": times[repeats // 10], "p90": times[-1 - repeats // 10]}


def measure(layer: Layer, function: Callable[..., tuple[Tensor, ...]], repeats: int) -> dict[str, Any]:
    upstream = torch.full((), L1_WEIGHT, device="cuda")

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*layer.leaves)[0]

    def both() -> tuple[Tensor, ...]:
        y, l1 = function(*layer.leaves)[:2]
        return (y, *torch.autograd.grad([y, l1], layer.leaves, [layer.dy, upstream]))

    result: dict[str, Any] = {"forward_ms": milliseconds(forward, repeats), "both_ms": milliseconds(both, repeats)}
    result["saved_bytes"] = saved_bytes(layer, function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = tuple(tensor.detach() for tensor in both())
    torch.cuda.synchronize()
    result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    result["errors"] = dict(zip(OUTPUTS, errors(layer, outputs), strict=True))
    return result


def saved_bytes(layer: Layer, function: Callable[..., tuple[Tensor, ...]]) -> int:
    inputs = {tensor.untyped_storage().data_ptr() for tensor in layer.leaves}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function(*layer.leaves)
    del kept
    return sum(sizes.values())


def fp64(layer: Layer) -> list[Tensor]:
    x, w_in, w_down = (tensor.detach().double() for tensor in layer.leaves)
    w_gate, w_up = w_in.chunk(2)
    g, u = torch.relu(x @ w_gate.t()), x @ w_up.t()
    h, dy = g * u, layer.dy.double()
    dh = dy @ w_down.t() + L1_WEIGHT * h.sign()
    y, dw_down = h @ w_down, h.t() @ dy
    dg, du = dh * u * (g > 0), dh * g
    return [y, dg @ w_gate + du @ w_up, dg.t() @ x, du.t() @ x, dw_down]


def errors(layer: Layer, outputs: tuple[Tensor, ...]) -> list[float]:
    y, dx, dw_in, dw_down = outputs
    found = [y, dx, *dw_in.chunk(2), dw_down]
    if not hasattr(layer, "reference"):
        layer.reference = fp64(layer)  # type: ignore[attr-defined]
    return [
        float((a.double() - b).norm() / b.norm())
        for a, b in zip(found, layer.reference, strict=True)  # type: ignore[attr-defined]
    ]


def sums_over_layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forward + backward of all captured layers together, one entry a shape: ms of compiled dense, of the sparse path
    and of `auto`, how many layers `auto` runs sparse, and how many times faster than compiled dense that is."""
    sums = []
    captured_rows = [row for row in rows if row["name"].startswith("captured ")]
    for dimensions in {tuple(row["shape"].items()): row["shape"] for row in captured_rows}.values():
        layers = [row for row in captured_rows if row["shape"] == dimensions]

        def milliseconds_of(layer: dict[str, Any], variant: str) -> float:
            return float(layer["results"][variant]["both_ms"]["median"])

        compiled = sum(milliseconds_of(layer, "compile") for layer in layers)
        sparse = sum(milliseconds_of(layer, "ours sparse") for layer in layers)
        auto = sum(milliseconds_of(layer, f"ours {layer['auto_path']}") for layer in layers)
        sums.append(
            {
                "shape": dimensions,
                "layers": len(layers),
                "compile_ms": compiled,
                "sparse_ms": sparse,
                "auto_ms": auto,
                "auto_sparse_layers": sum(layer["auto_path"] == "sparse" for layer in layers),
                "sparse_speedup": compiled / sparse,
                "auto_speedup": compiled / auto,
            }
        )
    return sums


def load_peer(checkout: Path) -> Callable[..., tuple[Tensor, ...]]:
    """The published training kernels, built by their own loader. Their L1 is a mean over tokens."""
    place = checkout / "custom_models" / "hybrid_modules" / "sparse_ops_loader.py"
    spec = importlib.util.spec_from_file_location("sparse_ops_loader", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load_sparse_ops()

    def peer(x: Tensor, w_in: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
        y, _, l1 = torch.ops.sparse_ops.ff_forward_gated(x[None], *w_in.chunk(2), w_down)[:3]
        return y[0], l1 * len(x)

    return peer


def variants(
    layer: Layer, compiled: Callable[..., Any], peer: Callable[..., Any] | None = None
) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    def ours(path: str) -> Callable[..., tuple[Tensor, ...]]:
        options: dict[str, Any] = {"order": layer.order, "capacity": layer.capacity} if path == "sparse" else {}
        return lambda *leaves: sparse_mlp(*leaves, path=path, sequences=layer.sequences, **options)

    all_variants = {"eager": dense, "compile": compiled, "ours dense": ours("dense"), "ours sparse": ours("sparse")}
    return all_variants | ({"peer": peer} if peer is not None else {})


def profile(layer: Layer) -> None:
    """Device time of each kernel of the sparse path, over five calls."""
    function = variants(layer, dense)["ours sparse"]
    upstream = torch.full((), L1_WEIGHT, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            y, l1 = function(*layer.leaves)[:2]
            torch.autograd.grad([y, l1], layer.leaves, [layer.dy, upstream])
        torch.cuda.synchronize()
    rows = [(event.device_time_total / 5, event.count / 5, event.key) for event in profiler.key_averages()]
    for time, count, key in sorted(rows, reverse=True):
        if time >= 0.5:
            name = key.replace("megasparse::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
            print(f"      {time:8.1f} us  x{count:<4.1f} {name.split('(')[0][:90]}")


def report(layer: Layer, results: dict[str, Any]) -> None:
    base = results["compile"]
    print(f"{layer.name}: L0 {layer.l0:.1f}, union {layer.union_fraction:.3f}")
    for name, result in results.items():
        forward, both = result["forward_ms"], result["both_ms"]
        print(
            f"  {name:12s} forward {forward['median']:6.3f} ms "
            f"({base['forward_ms']['median'] / forward['median']:4.2f}x)"
            f"   both {both['median']:6.3f} ms [{both['p10']:.3f}, {both['p90']:.3f}]"
            f" ({base['both_ms']['median'] / both['median']:4.2f}x)"
            f"   saved {result['saved_bytes'] / layer.dense_bytes:6.1%}   peak {result['peak_bytes'] / 2**20:7.0f} MiB"
            f"   err {' '.join(f'{value:.1e}' for value in result['errors'].values())}"
        )
    sys.stdout.flush()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One line of charts for every shape."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(tuple(row["shape"].values()) for row in rows))
    names = list(rows[0]["results"])
    figure, grid = plt.subplots(len(shapes), 2, figsize=(15, 3.6 * len(shapes)), squeeze=False, layout="constrained")
    for axes, of_shape in zip(grid, shapes, strict=True):
        cases = [row for row in rows if tuple(row["shape"].values()) == of_shape]
        labels = [f"{row['name']}\nL0 {row['l0']:.0f}\nunion {row['union_fraction']:.2f}" for row in cases]
        for axis, key, title in zip(axes, ("forward_ms", "both_ms"), ("forward", "forward + backward"), strict=True):
            for i, name in enumerate(names):
                values = [row["results"][name][key]["median"] for row in cases]
                places = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(cases))]
                axis.bar(places, values, 0.8 / len(names), label=name)
            axis.set_xticks(range(len(cases)), labels, fontsize=7)
            axis.set_title("{}: M {}, D {}, H {}".format(title, *of_shape), fontsize=10)
        axes[0].set_ylabel("ms")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def shape(text: str) -> tuple[int, int, int]:
    tokens, width, hidden = map(int, text.split(","))
    return tokens, width, hidden


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", type=shape, metavar="M,D,H", help="default 16384,2048,5632")
    parser.add_argument("--l0", type=float, nargs="*", default=[10, 30, 60, 120, 300], help="uniform random patterns")
    parser.add_argument("--patterns", type=Path, help="directory of recorded patterns (*.npz, packed bits in `a`)")
    parser.add_argument("--capture", type=Path, help="run or checkpoint whose layers are measured too")
    parser.add_argument("--peer", type=Path, help="checkout of the published kernels, measured too")
    parser.add_argument("--sequences", type=int, default=1, help="of M tokens; rows of x position after position")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_mlp"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU", file=sys.stderr)
        return 1
    shapes = arguments.shape or [(16384, 2048, 5632)]
    for tokens, width, hidden in shapes:
        if tiled_sequences(tokens, arguments.sequences) != arguments.sequences:
            print(
                f"error: {tokens} tokens are not {arguments.sequences} sequences of whole tiles of 128", file=sys.stderr
            )
            return 1
        if reason := device_reason(torch.device("cuda"), torch.bfloat16, width, hidden):
            print(f"error: {reason}", file=sys.stderr)
            return 1
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    peer = load_peer(arguments.peer) if arguments.peer else None
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for tokens, width, hidden in shapes:
        print(f"M {tokens}, D {width}, H {hidden}")
        torch.compiler.reset()
        compiled = torch.compile(dense, dynamic=False)
        for layer in cases(arguments, tokens, width, hidden):
            functions = variants(layer, compiled, peer)
            results = {name: measure(layer, function, arguments.repeats) for name, function in functions.items()}
            report(layer, results)
            if arguments.profile:
                profile(layer)
            predicted = predicted_ratio(layer.union_fraction, True, tokens, width, hidden)
            measured = results["ours sparse"]["both_ms"]["median"] / results["ours dense"]["both_ms"]["median"]
            print(f"  router predicts {predicted:.2f} of the dense path, measured {measured:.2f}")
            rows.append(
                {
                    "name": layer.name,
                    "shape": {"tokens": tokens, "width": width, "hidden": hidden},
                    "sequences": layer.sequences,
                    "l0": layer.l0,
                    "union_fraction": layer.union_fraction,
                    "auto_path": "sparse" if predicted < ENTER_SPARSE else "dense",
                    "results": results,
                }
            )
            del layer, functions
            torch.cuda.empty_cache()
            # After every case: a machine that is taken away later leaves what was measured.
            record = {
                "environment": describe_environment(world_size=1),
                "cases": rows,
                "sums_over_layers": sums_over_layers(rows),
            }
            (arguments.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    if not rows:
        print("error: nothing to measure: no pattern, and no layer of a checkpoint has such a shape", file=sys.stderr)
        return 1
    for each in sums_over_layers(rows):
        print(
            f"{each['layers']} layers together, forward + backward: compile {each['compile_ms']:.2f} ms, sparse "
            f"{each['sparse_ms']:.2f} ms ({each['sparse_speedup']:.2f}x), auto {each['auto_ms']:.2f} ms "
            f"({each['auto_speedup']:.2f}x, {each['auto_sparse_layers']} layers sparse)"
        )
    plot(rows, arguments.out / "results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
