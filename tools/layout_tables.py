"""Tables and a plot of what tools/compare_layouts.py found.

tools/layout_tables.py docs/benchmarks/layouts.json           write them again
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

GIB = 1 << 30
VARIANTS = ("dense", "sparse")


def write(record: dict[str, Any], prefix: Path) -> None:
    """`prefix`.json, .md and .png. `record`: `layouts` by name, each as `pick` makes it, the reference first."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(prefix.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    prefix.with_name(prefix.name + ".md").write_text(tables(record))
    plot(record, prefix.with_name(prefix.name + ".png"))


def pick(results: dict[str, Any]) -> dict[str, Any]:
    """Of the results.json of tools/benchmark_pretrain.py what is compared; what it has not reached is not there."""
    keys = ("tokens_per_second", "gpu_wait_share", "memory", "metrics")
    rows = {}
    for name in VARIANTS:
        found = results["variants"].get(name, {})
        row = {key: found[key] for key in keys if key in found}
        if "breakdown" in found:
            row["breakdown"] = {key: value for key, value in found["breakdown"].items() if key != "kernels"}
        rows[name] = row
    known = ("environment", "sparsity_from", "curve", "layers")
    return {**{key: results[key] for key in known if key in results}, "variants": rows}


def losses(layout: dict[str, Any]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in layout.get("curve", [])}


def differences(layout: dict[str, Any], reference: dict[str, Any]) -> dict[int, float]:
    """Loss minus the reference's, by step."""
    own, other = losses(layout), losses(reference)
    return {step: own[step] - other[step] for step in own if step in other}


def reference_of(record: dict[str, Any]) -> dict[str, Any]:
    """The first layout that was asked for; without a curve where it has not got that far."""
    found: dict[str, Any] = record["layouts"].get(record["reference"], {})
    return found


def tables(record: dict[str, Any]) -> str:
    """Markdown: losses and speed; communication and memory."""
    reference = reference_of(record)
    first = [
        "| layout | GPUs | last loss | mean gap | largest gap | tokens/s/GPU dense | sparse | sparse of dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    second = [
        "| layout | communication, ms: dense | alone | sparse | alone | idle: dense | sparse "
        "| host waits: dense | sparse | peak, GiB: dense | sparse | estimate off by: dense | sparse |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, layout in record["layouts"].items():
        label = name if layout["finished"] else f"{name} (not finished)"
        own = losses(layout)
        gaps = [abs(gap) for gap in differences(layout, reference).values()] if layout is not reference else []
        speed = [layout["variants"][variant].get("tokens_per_second") for variant in VARIANTS]
        rates = [f"{rate['median'] / layout['gpus']:,.0f}" if rate else "" for rate in speed]
        first.append(
            row(
                label,
                str(layout["gpus"]),
                f"{own[max(own)]:.4f}" if own else "",
                f"{statistics.mean(gaps):.4f}" if gaps else "",
                f"{max(gaps):.4f}" if gaps else "",
                *rates,
                f"{speed[1]['median'] / speed[0]['median']:.3f}x" if all(speed) else "",
            )
        )
        times = [layout["variants"][variant].get("breakdown") for variant in VARIANTS]
        memory = [layout["variants"][variant].get("memory") for variant in VARIANTS]
        waits = [layout["variants"][variant].get("gpu_wait_share") for variant in VARIANTS]
        cells = []
        for each in times:
            cells += [f"{1000 * each['communication']:.1f}", f"{1000 * each['exposed']:.1f}"] if each else ["", ""]
        cells += [f"{each['idle'] / (each['busy'] + each['idle']):.1%}" if each else "" for each in times]
        cells += [f"{each['median']:.1%}" if each else "" for each in waits]
        cells += [
            f"{each['measured']['peak'] / GIB:.2f}" if each and each["measured"]["peak"] else "" for each in memory
        ]
        cells += [f"{off:+.1%}" if (off := estimate_off_by(each)) is not None else "" for each in memory]
        second.append(row(label, *cells))
    return "\n".join(
        [
            *first,
            "",
            "Gaps: of the loss from the first layout's, over the steps of the curve.",
            "",
            *second,
            "",
            "Of one step, means over GPUs. *Communication*: at least one NCCL kernel ran, waiting for other ranks "
            "included; *alone*: and nothing else did. *Idle*: nothing ran (profiled, which slows the host). *Host "
            "waits*: for the first rank's GPU, not profiled; near zero, launching is what takes long. Peak: allocated, "
            "on the GPU with the highest; estimate: of `pretrain --dry-run`, without what no tensor holds.",
            "",
        ]
    )


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def estimate_off_by(memory: dict[str, Any] | None) -> float | None:
    """Estimate over measured peak of tensors, less one; None where no peak was measured (on CPUs)."""
    if not memory or not memory["measured"]["peak"]:
        return None
    estimate = sum(value for part, value in memory["estimate"].items() if part != "overhead")
    return float(estimate / memory["measured"]["peak"] - 1)


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, height_ratios=[3, 2])
    reference = reference_of(record)
    for index, (name, layout) in enumerate(record["layouts"].items()):
        style: dict[str, Any] = {"label": name, "linewidth": 1.1, "color": plt.get_cmap("tab20")(index % 20)}
        own = losses(layout)
        upper.plot(list(own), list(own.values()), **style)
        if layout is not reference:
            gaps = differences(layout, reference)
            lower.plot(list(gaps), list(gaps.values()), **style)
    upper.set_ylabel("loss/lm")
    upper.legend(fontsize=8, ncols=2)
    lower.set_ylabel(f"difference from {record['reference']}")
    lower.set_xlabel("step")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="layouts.json of tools/compare_layouts.py")
    place = parser.parse_args().results
    write(json.loads(place.read_text()), place.with_suffix(""))
