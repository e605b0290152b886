"""The plot of tools/study_sparsity.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_tables import excess_loss, layer_mean, of

Record = dict[str, Any]


def plot(records: Sequence[Record], variants: Sequence[str], path: Path) -> None:
    """Finished runs above, their losses against those of the first variant; below, one column for every variant that
    steers its coefficients: L0 and coefficients of every layer over the steps of its first seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    finished = [record for record in records if record["finished"]]
    reference = variants[0]
    variants = [variant for variant in variants if of(finished, variant)]
    if not variants:
        return
    colours = dict(zip(variants, palette([mode_of(of(finished, variant)[0]) for variant in variants]), strict=True))
    steered = [variant for variant in variants if mode_of(of(finished, variant)[0]) == "target"]
    figure = plt.figure(figsize=(max(16, 3.4 * len(steered)), 12.5 if steered else 5), layout="constrained")
    top, *lower = figure.subfigures(2, 1, height_ratios=[1, 1.5]) if steered else [figure.subfigures(1, 1)]
    quality, active, union = top.subplots(1, 3)
    draw_quality(quality, finished, variants, reference, colours)
    draw_layers(active, finished, variants, colours, "l0", "L0 (active neurons a token)")
    logarithmic(active)
    draw_layers(union, finished, variants, colours, "union_fraction", "union of 128 tokens, share of the width")
    top.legend(*quality.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(variants), 9))
    if steered:
        draw_steering(lower[0], [of(finished, variant)[0] for variant in steered])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def logarithmic(axis: Any) -> None:
    """With 60 at a tick instead of 6 x 10^1."""
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter())


def mode_of(record: Record) -> str:
    return str(record["config"]["sparsity"]["l1"]["mode"])


def palette(modes: Sequence[str]) -> list[Any]:
    """Black without an L1 term, reds for one coefficient, blue to green for targets; darker first."""
    from matplotlib import colormaps

    maps = {"constant": (colormaps["YlOrRd"], 0.95, 0.45), "target": (colormaps["viridis"], 0.1, 0.8)}
    colours = []
    for index, mode in enumerate(modes):
        if mode not in maps:
            colours.append(("black", "dimgrey", "darkgrey")[modes[:index].count(mode) % 3])
            continue
        ramp, begin, end = maps[mode]
        share = modes[:index].count(mode) / max(1, modes.count(mode) - 1)
        colours.append(ramp(begin + (end - begin) * share))
    return colours


def draw_quality(
    axis: Any, records: Sequence[Record], variants: Sequence[str], reference: str, colours: dict[str, Any]
) -> None:
    markers = {"off": "s", "constant": "^", "target": "o"}
    against = of(records, reference)
    for variant in variants:
        runs = of(records, variant)
        points = [(layer_mean(record, "union_fraction"), excess_loss(record, against)) for record in runs]
        style = {"color": colours[variant], "marker": markers[mode_of(runs[0])], "label": variant}
        axis.plot(*zip(*points, strict=True), linewidth=0.8, markersize=8, alpha=0.9, **style)  # None: a gap
    axis.set_xlabel("union of 128 tokens, share of the width, mean over layers")
    axis.set_ylabel(f"validation loss against {reference}, same seed (nats a token)")
    axis.set_title("quality against what the kernels pay for; one point a seed", fontsize=10)
    axis.grid(alpha=0.3)


def draw_layers(
    axis: Any, records: Sequence[Record], variants: Sequence[str], colours: dict[str, Any], key: str, title: str
) -> None:
    """At the end of the run; one line a seed."""
    for variant in variants:
        for record in of(records, variant):
            values = [layer[key] for layer in record["layers"]]
            axis.plot(range(len(values)), values, color=colours[variant], marker=".", linewidth=1.1, alpha=0.85)
    axis.set_xlabel("layer")
    axis.set_title(f"{title}, at the end", fontsize=10)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3, which="both")


def draw_steering(figure: Any, records: Sequence[Record]) -> None:
    from matplotlib import colormaps

    rows = figure.subplots(2, len(records), squeeze=False, sharex=True, sharey="row")
    for column, record in enumerate(records):
        layers = len(record["layers"])
        targets = record["config"]["sparsity"]["l1"]["target_l0"]
        for layer in range(layers):
            colour = colormaps["plasma"](0.9 * layer / max(1, layers - 1))
            label = f"layer {layer}" if layers <= 12 or layer in (0, layers - 1) else None
            for axis, curves in ((rows[0][column], "l0_curves"), (rows[1][column], "coeff_curves")):
                points = [(step, value) for step, value in record[curves][layer] if value]
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, label=label) if points else None
        for target in sorted(set(targets if isinstance(targets, list) else [targets])):
            rows[0][column].axhline(target, color="black", linestyle="--", linewidth=1)
        rows[0][column].set_title(f"{record['variant']}, seed {record['seed']}", fontsize=10)
        rows[1][column].set_xlabel("step")
        logarithmic(rows[0][column])
        rows[1][column].set_yscale("log")
        for axis in (rows[0][column], rows[1][column]):
            axis.grid(alpha=0.3)
    rows[0][0].set_ylabel("L0 by layer; dashed: target")
    rows[1][0].set_ylabel("L1 coefficient by layer")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=12)
