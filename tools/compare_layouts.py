#!/usr/bin/env python3
"""Train one config under several parallel layouts and lay the loss curves side by side.

    tools/compare_layouts.py configs/paper-0.5b.yaml --output docs/layouts \
        --layout "1 GPU" 1 --layout "TP 2" 2 parallel.tensor=2 --layout "PP 2" 2 parallel.pipeline=2 \
        --set training.steps=200 data.train=... data.valid=...

Each layout is a run of its own (same seed, so the same weights and the same data order), started with torchrun on
as many ranks as it names, one after the other. Written: a plot of the losses and of their differences from the
first layout, and a Markdown table with losses, gradient norms and tokens/s.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

Curve = dict[int, dict[str, float]]


def run_layout(config: str, name: str, ranks: int, overrides: list[str], directory: Path) -> Curve:
    """Train in `directory` (kept: a finished run is not repeated) and return metrics by step."""
    metrics = directory / "metrics.jsonl"
    if not (directory / "exit.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            "-m", "megasparse.cli", "pretrain", config, f"run.directory={directory}", f"run.name={directory.name}",
            *overrides,
        ]  # fmt: skip
        log = directory / "console.log"
        print(f"{name}: {' '.join(command[2:])} > {log}", flush=True)
        with log.open("w") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code != 0:
            tail = "\n".join(log.read_text().splitlines()[-30:])
            raise SystemExit(f"{name}: ended with exit code {code}; the end of {log}:\n{tail}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {row["step"]: row for row in rows if row["split"] == "train"}


def write_plot(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, differences) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[2, 1])
    reference = next(iter(curves.values()))
    for name, curve in curves.items():
        losses.plot(list(curve), [row["loss/lm"] for row in curve.values()], label=name, linewidth=1.2)
        if curve is not reference:
            common = [step for step in curve if step in reference]
            differences.plot(
                common, [curve[s]["loss/lm"] - reference[s]["loss/lm"] for s in common], label=name, linewidth=1.0
            )
    losses.set_ylabel("loss/lm")
    losses.legend()
    differences.set_ylabel(f"difference from {next(iter(curves))}")
    differences.set_xlabel("step")
    if len(curves) > 1:
        differences.legend()
    for axis in (losses, differences):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def table(curves: dict[str, Curve]) -> str:
    """Markdown: first and last loss, largest difference from the first layout, gradient norm, median tokens/s."""
    reference = next(iter(curves.values()))
    lines = [
        "| layout | steps | first loss | last loss | largest gap | mean gap | last grad norm | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, curve in curves.items():
        common = [step for step in curve if step in reference]
        gaps = [abs(curve[s]["loss/lm"] - reference[s]["loss/lm"]) for s in common]
        first, last = curve[min(curve)], curve[max(curve)]
        speed = statistics.median(row["throughput/tokens_per_second"] for row in list(curve.values())[1:])
        lines.append(
            f"| {name} | {max(curve)} | {first['loss/lm']:.4f} | {last['loss/lm']:.4f} | {max(gaps):.4f} "
            f"| {statistics.mean(gaps):.4f} | {last['grad_norm']:.3f} | {speed:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--layout", nargs="+", action="append", required=True, metavar=("NAME RANKS", "a.b=c"))
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides for every layout")
    parser.add_argument("--runs", type=Path, default=Path("runs/layouts"), help="where the runs go")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the .png and .md written")
    arguments = parser.parse_args()

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    curves: dict[str, Curve] = {}
    for name, ranks, *overrides in arguments.layout:
        directory = arguments.runs / name.lower().replace(" ", "-")
        curves[name] = run_layout(arguments.config, name, int(ranks), [*arguments.set, *overrides], directory)
        # After every layout: a machine that is taken away later leaves what was finished.
        write_plot(curves, arguments.output.with_suffix(".png"))
        arguments.output.with_suffix(".md").write_text(table(curves))
    print(table(curves))


if __name__ == "__main__":
    main()
