"""What tools/study_sparsity.py keeps of one run: read from its run.json, metrics.jsonl and mlp/results.json alone."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasparse.monitoring.report.data import Points, ReportError, Run
from megasparse.small_files import read_json

COMPARED = ("model", "sparsity", "parallel", "training", "optimizer")
"""Sections of the configuration that make two runs of one variant and seed the same run."""
END = 0.05
"""Share of a run's last steps over which its final sparsity is averaged: one record is one step's batch."""
LATE = 0.2
"""Share of a run's last steps that stand for its speed at the end."""
MOST_POINTS = 100
"""Of a curve."""


def read_run(folder: Path, variant: str, seed: int) -> dict[str, Any] | None:
    """The record of the run in `folder`; None where it has logged nothing yet.

    `finished` is False where the run has not been validated after its last step; the rest is then as far as it got.
    `wall_seconds` is from the first start to the last record. Sparsity at the end is a mean over the last END of the
    steps. `tokens_per_second`: `run` is all tokens over the seconds of their steps, `median` and `end` are medians of
    the records of the whole run and of its last LATE; none counts the first step, validation or checkpoints. `mlp` is
    benchmark_mlp.py's sum over the layers. What is not known or not finite is None.

    Raises:
        ReportError: metrics.jsonl is there without its run.json.
    """
    try:
        run = Run(folder)
    except ReportError:
        return None
    if not run.config:
        raise ReportError(f"{folder}: metrics.jsonl without a run.json; copy both")
    config, steps = run.config, run.total_steps or run.last_step
    losses = run.points("eval/loss", "valid")
    late = [value for step, value in run.points("throughput/tokens_per_second") if step > (1 - LATE) * steps]
    return {
        "variant": variant,
        "seed": seed,
        "finished": bool(losses) and losses[-1][0] == steps,
        "step": run.last_step,
        "steps": steps,
        "tokens": run.last("progress/tokens"),
        "tokens_per_step": config["training"]["global_batch_size"] * config["data"]["sequence_length"],
        "eval_tokens": config["training"]["eval_steps"]
        * config["training"]["global_batch_size"]
        * config["data"]["sequence_length"],
        "config": {section: config[section] for section in COMPARED},
        "environment": run.environment,
        "starts": len(run.starts),
        "wall_seconds": max(record.time for record in [*run.train, *run.valid]) - run.starts[0]["time"],
        "eval_loss": losses[-1][1] if losses and math.isfinite(losses[-1][1]) else None,
        "eval_curve": thin(losses),
        "loss_curve": thin(run.points("loss/lm")),
        "layers": [layer_at_end(run, layer, steps) for layer in run.layers],
        "l0_curves": [thin(run.points(f"sparsity/layer_{layer}/l0")) for layer in run.layers],
        "coeff_curves": [thin(run.points(f"l1/layer_{layer}/coeff")) for layer in run.layers],
        "tokens_per_second": {
            "run": overall_rate(run),
            "median": median([value for step, value in run.points("throughput/tokens_per_second") if step > 1]),
            "end": median(late),
        },
        "mlp": mlp_times(folder / "mlp" / "results.json", len(run.layers)),
    }


def layer_at_end(run: Run, layer: int, steps: int) -> dict[str, Any]:
    def mean(metric: str, prefix: str = "sparsity") -> float | None:
        points = run.points(f"{prefix}/layer_{layer}/{metric}")
        values = [value for step, value in points if step > (1 - END) * steps and math.isfinite(value)]
        return statistics.mean(values) if values else None

    shares = {metric: mean(metric) for metric in ("l0", "union_fraction", "dead_fraction")}
    return shares | {"path": run.last_text(f"sparsity/layer_{layer}/path"), "coeff": mean("coeff", "l1")}


def overall_rate(run: Run) -> float | None:
    """Tokens a second over all steps but the first, which builds and compiles."""
    tokens, seconds = 0.0, 0.0
    for before, record in zip(run.train, run.train[1:], strict=False):
        of_window = float(record.metrics["progress/tokens"] or 0) - float(before.metrics["progress/tokens"] or 0)
        tokens += of_window
        seconds += of_window / float(record.metrics["throughput/tokens_per_second"] or math.nan)
    return tokens / seconds if seconds > 0 else None


def mlp_times(path: Path, layers: int) -> dict[str, Any] | None:
    """None also where not all layers have been timed."""
    sums = read_json(path).get("sums_over_layers", [])
    return next((entry for entry in sums if entry["layers"] == layers), None)


def median(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None


def thin(points: Points) -> list[list[float | None]]:
    """At most MOST_POINTS of them, evenly, the last always, to five digits; not finite: None, JSON has no NaN."""
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = points[::-1][::every][::-1]
    return [[int(step), float(f"{value:.5g}") if math.isfinite(value) else None] for step, value in kept]


def read_records(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What `write_records` wrote, by variant and seed; nothing where there is no such file."""
    return {(record["variant"], record["seed"]): record for record in read_json(path).get("runs", [])}


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One line a run."""
    lines = [json.dumps(record, allow_nan=False) for record in records]
    path.write_text('{"runs": [\n' + ",\n".join(lines) + "\n]}\n")
