#!/usr/bin/env python3
"""Throughput and energy of a transformers model as it is (dense) and after `megasparse.hf.accelerate` (sparse).

    python tools/benchmark_inference.py --patterns DIR           the paper's 2B shape, layers as recorded in DIR/*.npz
    python tools/benchmark_inference.py --l0 60                  the same, neurons firing at random
    python tools/benchmark_inference.py --model exported         an exported checkpoint [--text FILE: on this text]
    python tools/benchmark_inference.py --quick --out DIR        seconds, on any machine: that the script runs

Measures, in turns so that both see the same clocks and temperature:

- forward: one forward over --batch x --sequence tokens, logits of the last one, no cache, as it is and with every
  decoder layer under torch.compile;
- decode: one greedy step of --decode-batches sequences at --context past tokens, compiled, as one CUDA graph;
- generate: `model.generate` of --new-tokens tokens, uncompiled;
- with --routes, one MLP layer by number of tokens (`inference_routes.py`).

Times are medians over --rounds blocks of calls, by CUDA events; energy is what NVML's counter of the board gained.
Errors are ||logits - fp32|| / ||fp32|| of the dense and the sparse model in bf16. What fired is measured on the model's
own inputs. How the random model is made: `inference_model.py`. Writes results.json and results.png to --out.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from decode_step import DecodeStep, one_layer_index
from inference_model import Layer, plant, random_llama, recorded_layers, set_rows, uniform_layer
from inference_routes import measure_routes, print_routes
from rich.console import Console
from rich.table import Table

from megasparse.hf import accelerate, calibrate, restore
from megasparse.hf.inference_mlp import InferenceMLP
from megasparse.monitoring.energy import EnergyMeter
from megasparse.monitoring.environment import describe_environment

NO_TIMES = ("errors", "failed", "routes")
"""Parts of the results that do not compare whole models."""

Calls = dict[str, Callable[[], Any]]
Measured = dict[str, dict[str, float]]


class Bench:
    """The two models and their inputs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.cuda = torch.cuda.is_available()
        self.device = "cuda" if self.cuda else "cpu"
        self.depths: list[float] | None = None
        self.recorded: dict[float, Layer] = {}
        self.recorded_tokens = arguments.recorded_tokens
        self.dense = self._load(arguments.model) if arguments.model else self._random()
        self.ids = self._tokens()
        self.sparse = copy.deepcopy(self.dense)
        accelerate(self.sparse, path="auto" if self.cuda else "sparse")
        sample = self.ids[: max(1, 16384 // self.ids.shape[1])]
        self.use_rows(sample.numel())
        self.observed = calibrate(self.sparse, sample)
        self.energy = EnergyMeter()

    def _load(self, folder: str) -> Any:
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if self.cuda else torch.float32
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()

    def _random(self) -> Any:
        a = self.arguments
        layers, width, hidden, heads, vocab = a.shape
        if a.patterns:
            self.recorded = recorded_layers(a.patterns, self.recorded_tokens, width, hidden, self.device)
        else:
            self.recorded = uniform_layer(a.l0, self.recorded_tokens, width, hidden, self.device)
        model = random_llama(layers, width, hidden, heads, vocab, self.device)
        self.depths = plant(model, self.recorded)
        return model

    def _tokens(self) -> Tensor:
        """int64 [batch, sequence]: of --text, repeated as needed, or drawn at random."""
        batch, sequence = self.arguments.batch, self.arguments.sequence
        if self.arguments.text:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.arguments.model)
            ids = torch.tensor(tokenizer(self.arguments.text.read_text(encoding="utf-8"))["input_ids"])
            ids = ids.repeat(-(-batch * sequence // ids.numel()))[: batch * sequence]
        else:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(self.dense.config.vocab_size, (batch * sequence,), generator=generator)
        return ids.view(batch, sequence).to(self.device)

    def use_rows(self, tokens: int, apart: int = 1) -> Tensor | None:
        """Let the next calls' tokens be recorded ones, `apart` from one another. None for a checkpoint."""
        if self.depths is None:
            return None
        rows = torch.arange(tokens, device=self.device) * apart % self.recorded_tokens
        for model in (self.dense, self.sparse):
            set_rows(model, rows)
        return rows

    def measure(self, calls: Calls, tokens: int) -> Measured:
        """Time and energy of each call, in turns; `tokens` are those that a call computes."""
        for call in calls.values():
            call()
        self.wait()
        inner = {name: max(1, round(self.arguments.block_s / self.block(call, 1)[0])) for name, call in calls.items()}
        blocks: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(self.arguments.rounds):
            for name, call in calls.items():
                blocks[name].append(self.block(call, inner[name]))
        found = {}
        for name, measured in blocks.items():
            seconds = sorted(item[0] for item in measured)
            found[name] = {
                "ms": 1e3 * statistics.median(seconds),
                "ms_least": 1e3 * seconds[0],
                "ms_most": 1e3 * seconds[-1],
                "tokens_per_second": tokens / statistics.median(seconds),
                "calls": inner[name] * len(seconds),
            }
            if self.energy.available:
                found[name]["mj_per_token"] = 1e3 * statistics.median(item[1] for item in measured) / tokens
        return found

    def block(self, call: Callable[[], Any], number: int) -> tuple[float, float]:
        """Seconds and joules of one of `number` calls."""
        self.wait()
        self.energy.read()
        start = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []
        if events:
            events[0].record()
        for _ in range(number):
            call()
        if events:
            events[1].record()
        self.wait()
        seconds = events[0].elapsed_time(events[1]) / 1e3 if events else time.perf_counter() - start
        return seconds / number, self.energy.read() / number

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def compile_layers(model: Any) -> None:
    """One compiled function serves all decoder layers (all with the same `sparse_from`, where they are accelerated)."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def eagerly(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return function()

    return call


def forward(bench: Bench) -> Measured:
    bench.use_rows(bench.ids.numel())
    calls: Calls = {}
    for name in ("dense", "sparse"):
        model = getattr(bench, name)

        def call(model: Any = model) -> Tensor:
            return model(input_ids=bench.ids, use_cache=False, logits_to_keep=1).logits

        calls[name] = eagerly(call)
        calls[f"{name} compiled"] = call
    return bench.measure(calls, bench.ids.numel())


def errors(bench: Bench) -> dict[str, float]:
    """Relative errors of the logits of up to 4096 tokens against the model in fp32."""
    ids = bench.ids[: max(1, 4096 // bench.ids.shape[1])]
    bench.use_rows(ids.numel())
    reference = copy.deepcopy(bench.dense).float()
    wanted = eagerly(lambda: reference(input_ids=ids, use_cache=False).logits)().double()
    found = {}
    for name in ("dense", "sparse"):
        model = getattr(bench, name)
        logits = eagerly(lambda model=model: model(input_ids=ids, use_cache=False).logits)().double()  # type: ignore[misc]
        found[name] = float((logits - wanted).norm() / wanted.norm())
        found[f"{name} same top"] = float((logits.argmax(-1) == wanted.argmax(-1)).double().mean())
    return found


def decode(bench: Bench, batch: int) -> Measured:
    if not bench.cuda:
        raise Skipped("needs CUDA graphs")
    steps, calls = {}, {}
    # Recorded tokens of different sequences, far apart; each model has its own place in them.
    apart = max(1, bench.recorded_tokens // batch)
    for name in ("dense", "sparse"):
        model, rows = getattr(bench, name), bench.use_rows(batch, apart)
        step = DecodeStep(model, batch, bench.arguments.context, rows, bench.recorded_tokens)
        with one_layer_index(model):
            graph = step.capture()
        if rows is not None:
            rows.copy_(torch.arange(batch, device="cuda") * apart)
        step.token.fill_(1)
        graph.replay()
        torch.cuda.synchronize()
        steps[name] = (step, graph, step.logits.double())
        calls[name] = graph.replay
    found = bench.measure(calls, batch)
    a, b = steps["sparse"][2], steps["dense"][2]
    found["sparse"]["logits_difference"] = float((a - b).norm() / b.norm())
    return found


def generate(bench: Bench, batch: int) -> Measured:
    tokens = bench.arguments.new_tokens
    prompt = bench.ids[:1, :1].repeat(batch, 1)
    bench.use_rows(batch, max(1, bench.recorded_tokens // batch))

    def call(model: Any) -> Tensor:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    calls = {name: eagerly(lambda name=name: call(getattr(bench, name))) for name in ("dense", "sparse")}  # type: ignore[misc]
    return bench.measure(calls, batch * tokens)


class Skipped(Exception):
    """A part that this machine cannot run, and why."""


def run(bench: Bench, console: Console) -> dict[str, Any]:
    """All parts; one that fails is reported and the others go on."""
    results: dict[str, Any] = {}
    a = bench.arguments
    if bench.cuda or a.quick:
        for model in (bench.dense, bench.sparse):
            compile_layers(model)
    parts: dict[str, Callable[[], Any]] = {"errors": lambda: errors(bench), "forward": lambda: forward(bench)}
    if a.routes:
        parts["routes"] = lambda: measure_routes(bench.recorded)
    for batch in a.decode_batches:
        parts[f"decode {batch}"] = lambda batch=batch: decode(bench, batch)  # type: ignore[misc]
        parts[f"generate {batch}"] = lambda batch=batch: generate(bench, batch)  # type: ignore[misc]
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                results[name] = part()
            console.print(f"[dim]{name}: {time.perf_counter() - start:.0f} s[/]")
        except Skipped as reason:
            console.print(f"{name}: skipped, {reason}")
        except Exception as error:  # what was measured before must not be lost
            console.print(f"[red]{name}: {type(error).__name__}: {str(error)[:2000]}[/]", markup=True)
            results.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
    return results


def layers_of(bench: Bench) -> list[dict[str, Any]]:
    mlps = [module for module in bench.sparse.modules() if isinstance(module, InferenceMLP)]
    return [
        {
            "l0": seen.l0,
            "union_fraction": seen.union_fraction,
            "depth": None if bench.depths is None else bench.depths[index],
            "sparse_from": mlp.sparse_from,
        }
        for index, (seen, mlp) in enumerate(zip(bench.observed, mlps, strict=True))
    ]


def print_layers(layers: list[dict[str, Any]], console: Console) -> None:
    """Layers that share a recorded pattern in one row."""
    table = Table(title="Layers, as measured on the model's own inputs")
    for column in ("layers", "L0", "union of 128 tokens", "sparse from"):
        table.add_column(column, justify="right")
    groups: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(index if layer["depth"] is None else layer["depth"], []).append(index)
    for members in groups.values():
        l0 = statistics.mean(layers[i]["l0"] for i in members)
        union = statistics.mean(layers[i]["union_fraction"] for i in members)
        name = f"{members[0]}" if len(members) == 1 else f"{members[0]}-{members[-1]}"
        table.add_row(name, f"{l0:.1f}", f"{union:.3f}", f"{layers[members[0]]['sparse_from']}")
    console.print(table)


def print_results(results: dict[str, Any], console: Console) -> None:
    table = Table(title="Sparse against dense, in one run")
    for column in ("part", "ms a call", "least to most", "tokens/s", "mJ/token", "of dense"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, measured in results.items():
        if part in NO_TIMES:
            continue
        for name, row in measured.items():
            base = measured[name.replace("sparse", "dense")]
            energy = row.get("mj_per_token")
            table.add_row(
                f"{part}: {name}",
                f"{row['ms']:.3f}",
                f"{row['ms_least']:.3f} to {row['ms_most']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                "-" if energy is None else f"{energy:.3f}",
                "" if row is base else f"{base['ms'] / row['ms']:.3f}x",
            )
    console.print(table)
    if "routes" in results:
        print_routes(results["routes"])
    if "errors" in results:
        found = results["errors"]
        console.print(
            f"Error of the logits against fp32: dense {found['dense']:.3e}, sparse {found['sparse']:.3e}; same most "
            f"likely token as fp32: dense {found['dense same top']:.2%}, sparse {found['sparse same top']:.2%}"
        )
    for part, measured in results.items():
        if part.startswith("decode"):
            console.print(f"{part}: logits of sparse and dense differ by {measured['sparse']['logits_difference']:.3e}")


def plot(results: dict[str, Any], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    parts = [part for part in results if part not in NO_TIMES]
    if not parts:
        return
    figure, axes = plt.subplots(2, len(parts), figsize=(3 * len(parts), 6), squeeze=False)
    for column, part in enumerate(parts):
        names = list(results[part])
        for row, (key, label) in enumerate((("ms", "ms a call"), ("mj_per_token", "mJ a token"))):
            axis = axes[row][column]
            values = [results[part][name].get(key, 0.0) for name in names]
            colors = ["tab:gray" if name.startswith("dense") else "tab:green" for name in names]
            bars = axis.bar(range(len(names)), values, color=colors)
            axis.bar_label(bars, fmt="{:,.4g}", fontsize=7)
            axis.margins(y=0.12)
            axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=7)
            if row == 0:
                axis.set_title(part, fontsize=9)
            if column == 0:
                axis.set_ylabel(label)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def shape(text: str) -> tuple[int, ...]:
    numbers = tuple(map(int, text.split(",")))
    if len(numbers) != 5:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYERS,HIDDEN,FFN,HEADS,VOCAB")
    return numbers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an exported model (a random one)")
    parser.add_argument("--text", type=Path, help="with --model: text to run on (random tokens)")
    parser.add_argument(
        "--shape", type=shape, default=(38, 2048, 5632, 32, 49152), metavar="LAYERS,HIDDEN,FFN,HEADS,VOCAB",
        help="of the random model (the paper's 2B: 38,2048,5632,32,49152)",
    )  # fmt: skip
    parser.add_argument("--patterns", type=Path, help="directory of recorded patterns (layerN.npz)")
    parser.add_argument("--l0", type=float, default=60, help="without patterns: neurons that fire, at random")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--decode-batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=128, help="past tokens of a decoded sequence (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of generate (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of calls (%(default)s)")
    parser.add_argument("--block-s", type=float, default=0.7, help="seconds of a block (%(default)s)")
    parser.add_argument("--routes", action="store_true", help="also times of one layer by number of tokens")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few calls")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_inference"))
    parsed = parser.parse_args()
    if parsed.text and not parsed.model:
        parser.error("--text needs --model, whose tokenizer reads it")
    if parsed.model and (parsed.patterns or parsed.routes):
        parser.error("--patterns and --routes are of the random model: leave them out, or --model")
    parsed.recorded_tokens = 16384
    if parsed.quick:
        parsed.shape, parsed.l0, parsed.recorded_tokens = (2, 64, 256, 4, 128), 20.0, 256
        parsed.batch, parsed.sequence, parsed.decode_batches, parsed.context = 2, 128, [1, 2], 8
        parsed.new_tokens, parsed.rounds, parsed.block_s = 4, 2, 0.01
    return parsed


def main() -> int:
    parsed = arguments()
    console = Console(width=120)
    if not torch.cuda.is_available() and not parsed.quick:
        console.print("error: no CUDA GPU (--quick runs anywhere)")
        return 1
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    start = time.perf_counter()
    bench = Bench(parsed)
    layers = layers_of(bench)
    print_layers(layers, console)
    results = run(bench, console)
    print_results(results, console)
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    record = {
        "environment": describe_environment(world_size=1),
        "settings": vars(parsed),
        "layers": layers,
        "results": results,
    }
    parsed.out.mkdir(parents=True, exist_ok=True)
    (parsed.out / "results.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    plot(
        results,
        f"{record['environment'].get('gpu', 'CPU')}, {parsed.batch} x {parsed.sequence}",
        parsed.out / "results.png",
    )
    restore(bench.sparse)
    return int("failed" in results)


if __name__ == "__main__":
    sys.exit(main())
