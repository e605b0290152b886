"""Tables and a plot of what tools/benchmark_pretrain.py found.

tools/pretrain_tables.py runs/benchmark_pretrain/results.json           print and draw them again
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 1 << 30
MEMORY = ("weights", "gradients", "optimizer", "activations", "temporaries", "other")


def write(record: dict[str, Any], folder: Path) -> None:
    """Prints the tables; writes them to tables.txt and the plot to results.png."""
    tables = [
        header(record),
        layers(record),
        speed(record),
        *([memory(record)] if any("memory" in row for row in record["variants"].values()) else []),
        *([breakdown(record)] if any("breakdown" in row for row in record["variants"].values()) else []),
    ]
    with (folder / "tables.txt").open("w") as file:
        for console in (Console(file=file, width=170), Console(width=170)):
            for table in tables:
                console.print(table)
    try:
        plot(record, folder / "results.png")
    except ImportError:
        print("no plot: matplotlib is not installed")


def header(record: dict[str, Any]) -> str:
    environment, model = record["environment"], record["config"]["model"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"{environment.get('gpu', 'CPU')} x {environment['world_size']}; {versions}",
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, FFN {model['ffn_hidden_size']}, sequence "
        f"{record['config']['data']['sequence_length']}; {environment['command']}",
        "sparsity of: " + "; then ".join(
            stage["what"]
            + (f" ({stage['steps']} steps, {stage['tokens'] / 1e6:.1f} M tokens)" if "steps" in stage else "")
            for stage in record["sparsity_from"] or [{"what": "the first weights"}]
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def new_table(title: str, first: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def layers(record: dict[str, Any]) -> Table:
    rows = record["layers"]
    table = new_table("layers", "layer", ["L0", "union / width", "dead", "path"])
    for index, row in enumerate(rows):
        table.add_row(
            str(index), f"{row['l0']:.1f}", f"{row['union_fraction']:.3f}", f"{row['dead_fraction']:.1%}", row["path"]
        )
    means = [sum(row[key] for row in rows) / len(rows) for key in ("l0", "union_fraction", "dead_fraction")]
    sparse = sum(row["path"] == "sparse" for row in rows)
    table.add_row("mean", f"{means[0]:.1f}", f"{means[1]:.3f}", f"{means[2]:.1%}", f"{sparse} sparse", style="bold")
    return table


def speed(record: dict[str, Any]) -> Table:
    columns = ["micro x global batch", "tokens/s/GPU", "lowest, highest", "of dense", "TFLOP/s", "executed", "MFU"]
    table = new_table("speed, whole steps", "", [*columns, "mJ/token", "of dense", "first loss"])
    base = record["variants"].get("dense", {})
    for name, row in record["variants"].items():
        if "tokens_per_second" not in row:
            continue
        world, metrics = record["environment"]["world_size"], row["metrics"]
        rates = row["tokens_per_second"]
        energy, reference = row.get("joules_per_token"), base.get("joules_per_token")
        mfu = metrics.get("throughput/mfu")
        table.add_row(
            name,
            f"{row['micro_batch_size']} x {row['global_batch_size']}",
            f"{rates['median'] / world:,.0f}",
            f"{rates['min'] / world:,.0f}, {rates['max'] / world:,.0f}",
            f"{rates['median'] / base['tokens_per_second']['median']:.3f}x" if "tokens_per_second" in base else "",
            f"{metrics['throughput/tflops_per_gpu']:.1f}",
            f"{metrics['perf/executed_tflops_per_gpu']:.1f}",
            f"{mfu:.1%}" if mfu is not None else "",
            f"{1000 * energy['median']:.2f}" if energy else "",
            f"{energy['median'] / reference['median']:.3f}x" if energy and reference else "",
            f"{row['windows'][0]['loss']:.5f}",
        )
    table.caption = (
        f"medians of {len(base.get('windows', []))} windows; TFLOP/s of the dense-equivalent model, executed: "
        "of what the sparse path computes"
    )
    return table


def memory(record: dict[str, Any]) -> Table:
    columns = [*MEMORY, "peak allocated", "GPU in use", "activations + temporaries, of dense"]
    table = new_table("memory of a step, GiB: measured | estimate of `pretrain --dry-run`, off by", "", columns)
    base = record["variants"].get("dense", {}).get("memory")
    for name, row in record["variants"].items():
        if "memory" not in row:
            continue
        entry = row["memory"]
        measured, estimate = entry["measured"], entry.get("estimate")
        cells = [against(measured[key], estimate and estimate.get(key)) for key in MEMORY]
        tensors = estimate and sum(estimate[key] for key in MEMORY if key in estimate)
        cells.append(against(measured["peak"], tensors))
        cells.append(against(measured["device"], estimate and sum(estimate.values())) if entry["alone"] else "")
        share = ""
        if base and base["measured"]["activations"]:
            own, dense = (m["activations"] + m["temporaries"] for m in (measured, base["measured"]))
            share = f"{own / dense:.1%}"
        table.add_row(name, *cells, share)
    table.caption = (
        "GPU in use: with the CUDA context, libraries and the allocator's cache, where no second model was there; "
        "the estimate allows for them"
    )
    return table


def against(measured: float, estimate: float | None) -> str:
    if estimate is None:
        return f"{measured / GIB:.2f}"
    off = f", {estimate / measured - 1:+.0%}" if measured else ""
    return f"{measured / GIB:.2f} | {estimate / GIB:.2f}{off}"


def breakdown(record: dict[str, Any]) -> Table:
    found = {name: row["breakdown"] for name, row in record["variants"].items() if "breakdown" in row}
    parts = list(next(iter(found.values()))["parts"])
    alone = not any(each["parts"]["communication"] for each in found.values())
    columns = [*parts, "busy", "idle"] if alone else [*parts, "communication alone", "busy", "idle"]
    table = new_table("where a step's time goes, ms and share (profiled; mean over GPUs)", "", columns)
    for name, each in found.items():
        whole = each["busy"] + each["idle"]
        exposed = [] if alone else [each["exposed"]]
        times = [*each["parts"].values(), *exposed, each["busy"], each["idle"]]
        table.add_row(name, *(f"{1000 * time:.1f}\n{time / whole if whole else 0:.1%}" for time in times))
    table.caption = (
        "a norm that Transformer Engine fuses into a projection counts with the projection; communication alone: "
        "while nothing else ran, waiting for other ranks included"
    )
    return table


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = {name: row for name, row in record["variants"].items() if "tokens_per_second" in row}
    figure, axes = plt.subplots(1, 4, figsize=(20, 1.6 + 0.45 * max(5, len(variants))), width_ratios=[3, 3, 3, 2])
    names, world = list(variants), record["environment"]["world_size"]
    rates = [row["tokens_per_second"] for row in variants.values()]
    medians = [rate["median"] / world for rate in rates]
    spread = [[m - r["min"] / world for m, r in zip(medians, rates, strict=True)],
              [r["max"] / world - m for m, r in zip(medians, rates, strict=True)]]  # fmt: skip
    axes[0].barh(names, medians, xerr=spread, capsize=4, color="tab:blue")
    for y, value in enumerate(medians):
        axes[0].text(value / 2, y, f"{value:,.0f}", va="center", ha="center", color="white")
    axes[0].set_title("tokens/s/GPU")
    axes[0].locator_params(axis="x", nbins=5)
    axes[0].xaxis.set_major_formatter("{x:,.0f}")
    with_memory = {name: row["memory"]["measured"] for name, row in variants.items() if "memory" in row}
    stack(axes[1], names, with_memory, MEMORY, 1 / GIB, "peak memory, GiB")
    profiled = {name: row["breakdown"] for name, row in variants.items() if "breakdown" in row}
    times = {name: {**row["parts"], "idle": row["idle"]} for name, row in profiled.items()}
    parts = next(iter(times.values())) if times else {}
    stack(axes[2], names, times, tuple(parts), 1e3, "time of a step, ms")
    for axis in axes[:3]:
        axis.invert_yaxis()
    for axis in axes[1:3]:
        axis.set_yticks([])
    rows = record["layers"]
    l0, union = "tab:blue", "tab:orange"
    axes[3].plot([row["l0"] for row in rows], ".-", color=l0)
    axes[3].set_yscale("log")
    axes[3].yaxis.set_major_formatter("{x:g}")
    axes[3].yaxis.set_minor_formatter("{x:g}")
    axes[3].tick_params(axis="y", which="both", colors=l0)
    axes[3].set_xlabel("layer")
    axes[3].set_title("L0 (left), union of 128 tokens / width (right)", fontsize=9)
    right = axes[3].twinx()
    right.plot([row["union_fraction"] for row in rows], ".-", color=union)
    right.tick_params(axis="y", colors=union)
    right.set_ylim(0, max(0.05, *(row["union_fraction"] for row in rows if math.isfinite(row["union_fraction"]))))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def stack(
    axis: Any, names: list[str], rows: dict[str, dict[str, float]], keys: tuple[str, ...], unit: float, title: str
) -> None:
    """One bar a variant, cut into `keys`; no bar where a variant has no row. The legend stands below."""
    import matplotlib

    left = [0.0] * len(names)
    for index, key in enumerate(keys):
        lengths = [rows[name][key] * unit if name in rows else 0.0 for name in names]
        axis.barh(names, lengths, left=left, label=key, color=matplotlib.colormaps["tab20"](index))
        left = [a + b for a, b in zip(left, lengths, strict=True)]
    axis.set_title(title)
    axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of tools/benchmark_pretrain.py")
    place = parser.parse_args().results
    write(json.loads(place.read_text()), place.parent)
