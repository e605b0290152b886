"""The Markdown tables of tools/study_sparsity.py."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]
Value = Callable[[Record], float | None]


def tables(records: Sequence[Record], variants: Sequence[str], seeds: Sequence[int]) -> str:
    """Both tables, of the runs that finished, and what stands below them. The first variant is the reference."""
    finished = [record for record in records if record["finished"]]
    if not finished:
        return "No run has finished yet.\n"
    return "\n".join(
        [by_variant(finished, variants), notes(finished, variants, seeds), "", by_layer(finished, variants)]
    )


def of(records: Sequence[Record], variant: str) -> list[Record]:
    return [record for record in records if record["variant"] == variant]


def excess_loss(record: Record, reference: Sequence[Record]) -> float | None:
    """Validation loss above that of the reference at the same seed, which reads the same held-out samples."""
    against = {run["seed"]: run["eval_loss"] for run in reference}
    losses = record["eval_loss"], against.get(record["seed"])
    return None if None in losses else losses[0] - losses[1]


def by_variant(records: Sequence[Record], variants: Sequence[str]) -> str:
    reference = of(records, variants[0])
    mlp = any(record["mlp"] for record in records)
    columns = [
        "variant", "seeds", "validation loss", f"against {variants[0]}, same seed", "mean L0", "mean union",
        "largest union of a layer", "largest dead share of a layer", "sparse layers", "tokens/s over the run",
        "tokens/s at its end", *(["MLPs, compiled dense = 1"] if mlp else []),
    ]  # fmt: skip
    lines = [row(columns), row(["---"] * len(columns))]
    for variant in variants:
        runs = of(records, variant)
        if not runs:
            continue

        is_reference = variant == variants[0]
        cells = [
            variant,
            " ".join(str(record["seed"]) for record in runs),
            spread(runs, lambda record: record["eval_loss"], "{:.4f}"),
            "" if is_reference else spread(runs, lambda record: excess_loss(record, reference), "{:+.4f}"),
            mean_text(runs, lambda record: layer_mean(record, "l0"), "{:.0f}"),
            mean_text(runs, lambda record: layer_mean(record, "union_fraction"), "{:.3f}"),
            largest(runs, "union_fraction", "{:.3f}"),
            largest(runs, "dead_fraction", "{:.0%}"),
            mean_text(runs, sparse_layers, "{:.3g}") + f" of {len(runs[0]['layers'])}",
            speed(runs, reference, "run"),
            speed(runs, reference, "end"),
            *([mean_text(runs, lambda record: (record["mlp"] or {}).get("auto_speedup"), "{:.2f}x")] if mlp else []),
        ]
        lines.append(row(cells))
    return "\n".join(lines)


def by_layer(records: Sequence[Record], variants: Sequence[str]) -> str:
    """L0, union and dead share of every layer, means over seeds."""
    count = max(len(record["layers"]) for record in records)
    lines = [row(["variant", "layer", *map(str, range(count))]), row(["---"] * (count + 2))]
    for variant in variants:
        runs = of(records, variant)
        name = variant
        for title, key, form in (
            ("L0", "l0", "{:.0f}"),
            ("union", "union_fraction", "{:.3f}"),
            ("dead", "dead_fraction", "{:.0%}"),
        ):
            if runs:
                cells = [
                    mean_text(runs, lambda record, i=layer, k=key: record["layers"][i][k], form)
                    for layer in range(count)
                ]
                lines.append(row([name, title, *cells]))
                name = ""
    return "\n".join(lines) + "\n"


def notes(records: Sequence[Record], variants: Sequence[str], seeds: Sequence[int]) -> str:
    """What the figures are of: model, data, machine, and which runs are missing."""
    first = records[0]
    model, environment, step_tokens = first["config"]["model"], first["environment"], first["tokens_per_step"]
    machines = sorted({record["environment"].get("gpu", "CPU") for record in records})
    commits = sorted({(record["environment"].get("git_commit") or "unknown")[:12] for record in records})
    windows = sorted({record["config"]["sparsity"]["dead_window_steps"] for record in records})
    done = {(record["variant"], record["seed"]) for record in records}
    missing = [f"{variant}, seed {seed}" for seed in seeds for variant in variants if (variant, seed) not in done]
    lines = [
        "",
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, FFN {model['ffn_hidden_size']}; "
        f"{first['steps']:,} steps of {step_tokens:,} tokens ({first['steps'] * step_tokens / 1e6:.1f} M); validation "
        f"on {first['eval_tokens']:,} tokens. {', '.join(machines)}; torch {environment['versions'].get('torch')}; "
        f"commit {', '.join(commits)}.",
        "",
        "Means over seeds, [lowest, highest]; the largest union and dead share are the worst of all seeds. Union: "
        "neurons active for any of 128 tokens, share of the width. Dead: silent for "
        f"{' or '.join(map(str, windows))} steps. tokens/s: of {variants[0]}.",
    ]
    if missing:
        lines += ["", f"Not finished: {'; '.join(missing)}."]
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def known(records: Sequence[Record], value: Value) -> list[float]:
    return [found for record in records if (found := value(record)) is not None]


def mean_text(records: Sequence[Record], value: Value, form: str) -> str:
    values = known(records, value)
    return form.format(statistics.mean(values)) if values else ""


def spread(records: Sequence[Record], value: Value, form: str) -> str:
    values = known(records, value)
    if len(values) < 2:
        return mean_text(records, value, form)
    return f"{form.format(statistics.mean(values))} [{form.format(min(values))}, {form.format(max(values))}]"


def largest(records: Sequence[Record], key: str, form: str) -> str:
    """Of any layer of any of the runs."""
    values = [layer[key] for record in records for layer in record["layers"] if layer[key] is not None]
    return form.format(max(values)) if values else ""


def layer_mean(record: Record, key: str) -> float | None:
    values = [layer[key] for layer in record["layers"] if layer[key] is not None]
    return statistics.mean(values) if values else None


def sparse_layers(record: Record) -> float:
    return sum(layer["path"] == "sparse" for layer in record["layers"])


def speed(records: Sequence[Record], reference: Sequence[Record], when: str) -> str:
    """Tokens a second over those of the reference; of the reference itself the figure."""
    rates = known(records, lambda record: record["tokens_per_second"][when])
    bases = known(reference, lambda record: record["tokens_per_second"][when])
    if not rates:
        return ""
    rate = statistics.mean(rates)
    return f"{rate:,.0f}" if not bases or records == reference else f"{rate / statistics.mean(bases):.2f}x"
