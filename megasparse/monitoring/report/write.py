"""Puts the sections of a report together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megasparse.monitoring.report.charts import Series, bar_chart, byte_size, heat_map, line_chart, percent, short
from megasparse.monitoring.report.data import Grid, ReportError, Run
from megasparse.monitoring.report.page import fold, page, section, table, tiles
from megasparse.small_files import write_text

FILE_NAME = "report.html"


def write_report(run_dir: Path | str, *others: Path | str, output: Path | str | None = None) -> Path:
    """Write a self-contained HTML report of one run, or of several compared. Returns its path.

    Args:
        run_dir: directory that holds the run's metrics.jsonl (and run.json, for configuration and environment).
        others: further runs, drawn in the same charts.
        output: where to write; None: report.html in `run_dir`.

    Raises:
        ReportError: a directory holds no training metrics, or the report cannot be written.
    """
    runs = [Run(Path(directory)) for directory in (run_dir, *others)]
    _make_names_unique(runs)
    body = "".join(
        [
            _tiles(runs[0]) if len(runs) == 1 else _comparison(runs),
            _loss(runs),
            _sparsity(runs),
            _memory(runs),
            _speed(runs),
            _optimization(runs),
            *(_final_table(run, len(runs) > 1) for run in runs),
            _differences(runs) if len(runs) > 1 else "",
            *(_about(run, len(runs) > 1) for run in runs),
        ]
    )
    title = runs[0].name if len(runs) == 1 else " / ".join(run.name for run in runs)
    path = Path(output) if output is not None else Path(run_dir) / FILE_NAME
    try:
        write_text(path, page(title, _subtitle(runs), body))
    except OSError as error:
        raise ReportError(f"{path}: cannot be written: {error.strerror}; choose another place with --output") from error
    return path


def _make_names_unique(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    for index, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({index + 1})"


def _subtitle(runs: Sequence[Run]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if len(runs) > 1:
        return f"{len(runs)} runs compared, {written}"
    run, parts = runs[0], []
    model = run.config.get("model", {})
    if model:
        layers, hidden, width = (model.get(key) for key in ("num_layers", "hidden_size", "ffn_hidden_size"))
        parts.append(f"{layers} layers x {hidden}, FFN {width}")
    if run.environment.get("parameters"):
        parts.append(f"{short(run.environment['parameters'])} parameters")
    of = f" of {run.total_steps}" if run.total_steps else ""
    parts.append(f"step {run.last_step}{of}")
    if world := run.environment.get("world_size"):
        device = run.environment.get("gpu", "CPU process" + ("es" if world > 1 else ""))
        parts.append(f"{world} x {device}")
    return ", ".join([*parts, written])


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of what one looks for first; what was not measured is left out."""
    facts: list[tuple[str, str, str]] = []

    def add(label: str, value: float | None, form: Callable[[float], str] = short, remark: str = "") -> None:
        if value is not None:
            facts.append((label, form(value), remark))

    perplexity = run.last("eval/ppl", "valid")
    remark = f"perplexity {short(perplexity)}" if perplexity else ""
    add("validation loss", run.last("eval/loss", "valid"), _four, remark)
    add("training loss", run.last("loss/lm"), _four)
    if skipped := run.last("optim/skipped_steps"):
        add("skipped steps", skipped, remark="gradients were not finite")
    if l0 := run.mean_over_layers("l0"):
        share = f"{percent(l0[-1][1] / run.ffn_width)} of {run.ffn_width}" if run.ffn_width else ""
        add("mean L0", l0[-1][1], remark=share)
    if union := run.mean_over_layers("union_fraction"):
        add("tile union", union[-1][1], percent, "of the neurons, 128 tokens")
    if dead := run.mean_over_layers("dead_fraction"):
        add("dead neurons", dead[-1][1], percent)
    per_rank = run.typical("throughput/tokens_per_second_per_gpu")
    several = per_rank is not None and run.environment.get("world_size", 1) > 1
    remark = f"{short(per_rank)} per rank" if several and per_rank else "median of the last half"
    add("tokens/s", run.typical("throughput/tokens_per_second"), remark=remark)
    add("MFU", run.typical("throughput/mfu"), percent, "dense-equivalent, bf16 peak")
    joules = run.typical("energy/joules_per_token")
    add("energy", joules, lambda value: f"{short(1000 * value)} mJ", "per token, all GPUs")
    peak = run.last("memory/peak_allocated_bytes")
    if peak is not None:
        add("peak GPU memory", peak, byte_size, "largest over ranks")
    else:
        add("peak memory", run.last("memory/peak_rss_bytes"), byte_size, "resident, largest over ranks")
    add("tokens seen", run.last("progress/tokens"))
    return facts


def _tiles(run: Run) -> str:
    return tiles(_facts(run))


def _comparison(runs: Sequence[Run]) -> str:
    facts = [{label: value for label, value, _ in _facts(run)} for run in runs]
    labels = list(dict.fromkeys(label for fact in facts for label in fact))
    rows = [[run.name, *(fact.get(label, "-") for label in labels)] for run, fact in zip(runs, facts, strict=True)]
    return "<h2>Results</h2>" + table(["run", *labels], rows)


def _prefix(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _lines(runs: Sequence[Run], title: str, metric: str, **options: Any) -> str:
    series = [Series(run.name, run.points(metric), index) for index, run in enumerate(runs)]
    return line_chart(title, series, marks=_marks(runs), **options)


def _marks(runs: Sequence[Run]) -> list[int]:
    return runs[0].resumed_steps if len(runs) == 1 else []


def _loss(runs: Sequence[Run]) -> str:
    loss = []
    for index, run in enumerate(runs):
        # One run: training and validation in two colours. Several: a colour a run, validation with dots.
        loss.append(Series(f"{_prefix(run, runs)}training", run.points("loss/lm"), index))
        valid = run.points("eval/loss", "valid")
        colour, several = (1, False) if len(runs) == 1 else (index, True)
        loss.append(Series(f"{_prefix(run, runs)}validation", valid, colour, dots=True, dashed=several))
    note = "Dashed verticals are restarts." if _marks(runs) else ""
    by_tokens = []
    if len({round(run.tokens_a_step) for run in runs}) > 1:  # at the same step they have not seen the same
        of = [run for run in runs for _ in range(2)]
        by_tokens = [replace(one, points=run.over_tokens(one.points)) for run, one in zip(of, loss, strict=True)]
    return section(
        "Loss",
        line_chart("Cross entropy, nats per token", loss, log=True, marks=_marks(runs), note=note, unit=_loss_unit),
        line_chart("Cross entropy over tokens seen", by_tokens, log=True, unit=_loss_unit, x_name="tokens"),
        _lines(
            runs, "L1 term of the loss", "loss/l1", zero=True,
            note="Mean over layers of coefficient x mean over tokens of the sum of |h|",
        ),
    )  # fmt: skip


def _sparsity(runs: Sequence[Run]) -> str:
    mean = [Series(run.name, run.mean_over_layers("l0"), index) for index, run in enumerate(runs)]
    if len(runs) == 1:
        grid = runs[0].grid("l0")
        mean[0].name = "mean over layers"
        if len(runs[0].layers) > 1:
            mean.append(Series("sparsest layer", _extreme(grid, min), 2, dashed=True))
            mean.append(Series("densest layer", _extreme(grid, max), 1, dashed=True))
    figures = [
        line_chart("L0: active neurons per token", mean, log=True, marks=_marks(runs)),
        line_chart(
            "Tile union, mean over layers",
            [Series(run.name, run.mean_over_layers("union_fraction"), index) for index, run in enumerate(runs)],
            zero=True, unit=percent, marks=_marks(runs),
            note="Share of the neurons active for any of 128 consecutive tokens: what the sparse path computes",
        ),
    ]  # fmt: skip
    grids = [run.grid("l0") for run in runs]
    values = [value for grid in grids for value in grid.finite() if value > 0]
    if values:
        low, high = min(values), max(values)
        for run, grid in zip(runs, grids, strict=True):
            grid.values = [[max(value, low) if value == value else value for value in row] for row in grid.values]
            title = f"{_prefix(run, runs)}L0 per layer over time"
            figures.append(heat_map(title, grid, low=low, high=high, log=high / low > 4))
    for run in runs:
        grid = run.grid("dead_fraction")
        title = f"{_prefix(run, runs)}Dead neurons per layer over time"
        note = "Share of a layer's neurons that fired for no token in the window"
        figures.append(heat_map(title, grid, low=0.0, high=max([*grid.finite(), 0.01]), unit=percent, note=note))
    return section("Sparsity", *figures)


def _extreme(grid: Grid, choose: Callable[[list[float]], float]) -> list[tuple[float, float]]:
    columns = [[row[c] for row in grid.values if math.isfinite(row[c])] for c in range(len(grid.steps))]
    return [(step, choose(column)) for step, column in zip(grid.steps, columns, strict=True) if column]


def _memory(runs: Sequence[Run]) -> str:
    layers = sorted({layer for run in runs for layer in run.layers})

    def newest(run: Run, metric: str) -> list[float]:
        values = (run.last(f"memory/layer_{layer}/{metric}") for layer in layers)
        return [math.nan if value is None else value for value in values]

    bars = [(f"{_prefix(run, runs)}kept for the backward", newest(run, "saved_bytes")) for run in runs]
    if len(runs) == 1:
        bars.append(("peak while the MLP runs", newest(runs[0], "peak_bytes")))
    saved = []
    for index, run in enumerate(runs):
        grid = run.grid("saved_bytes", "memory")
        total = [(s, sum(row[c] for row in grid.values)) for c, s in enumerate(grid.steps)]
        saved.append(Series(run.name, total, index))
    return section(
        "Memory",
        bar_chart(
            "MLP memory per layer, last sample", [str(layer) for layer in layers], bars, unit=byte_size,
            note="One micro-batch, largest over ranks",
        ),
        line_chart("Kept for the backward by all MLPs", saved, zero=True, unit=byte_size, marks=_marks(runs)),
        _lines(runs, "Peak allocated GPU memory", "memory/peak_allocated_bytes", zero=True, unit=byte_size),
        _lines(runs, "Resident memory of the process", "memory/rss_bytes", zero=True, unit=byte_size),
    )  # fmt: skip


def _speed(runs: Sequence[Run]) -> str:
    return section(
        "Speed",
        _lines(runs, "Tokens per second", "throughput/tokens_per_second", zero=True),
        _lines(
            runs, "Model TFLOP/s per GPU", "throughput/tflops_per_gpu", zero=True,
            note="Of the dense-equivalent model: zeros count like any number, recomputation does not",
        ),
        _lines(runs, "Model FLOPs utilisation", "throughput/mfu", zero=True, unit=percent),
        _lines(runs, "Energy per token, J", "energy/joules_per_token", zero=True),
    )  # fmt: skip


def _optimization(runs: Sequence[Run]) -> str:
    return section(
        "Optimization",
        _lines(runs, "Learning rate", "lr", zero=True),
        _lines(runs, "Gradient norm before clipping", "grad_norm", log=True),
        _lines(runs, "L1 coefficient, mean over layers", "l1/coeff", zero=True),
    )


def _final_table(run: Run, named: bool) -> str:
    if not run.layers:
        return ""
    columns: list[tuple[str, Callable[[int], str]]] = [
        ("L0", lambda i: _cell(run.last(f"sparsity/layer_{i}/l0"), short)),
        ("density", lambda i: _cell(run.last(f"sparsity/layer_{i}/density"), percent)),
        ("L1", lambda i: _cell(run.last(f"sparsity/layer_{i}/l1"), short)),
        ("L1 coefficient", lambda i: _cell(run.last(f"l1/layer_{i}/coeff"), short)),
        ("dead", lambda i: _cell(run.last(f"sparsity/layer_{i}/dead_fraction"), percent)),
        ("tile union", lambda i: _cell(run.last(f"sparsity/layer_{i}/union_fraction"), percent)),
        ("path", lambda i: run.last_text(f"sparsity/layer_{i}/path") or "-"),
        ("kept for the backward", lambda i: _cell(run.last(f"memory/layer_{i}/saved_bytes"), byte_size)),
        ("peak", lambda i: _cell(run.last(f"memory/layer_{i}/peak_bytes"), byte_size)),
    ]
    rows = [[str(layer), *(cell(layer) for _, cell in columns)] for layer in run.layers]
    heading = f"<h2>Layers at step {run.last_step}" + (f", {run.name}" if named else "") + "</h2>"
    return heading + table(["layer", *(name for name, _ in columns)], rows)


def _differences(runs: Sequence[Run]) -> str:
    flat = [_flatten(run.config) for run in runs]
    keys = sorted({key for one in flat for key in one})
    rows = [
        [key, *(str(one.get(key, "-")) for one in flat)] for key in keys if len({str(one.get(key)) for one in flat}) > 1
    ]
    head = ["key", *(run.name for run in runs)]
    return "<h2>Differences of the configurations</h2>" + table(head, rows, words=True) if rows else ""


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def _about(run: Run, named: bool) -> str:
    if not run.config and not run.environment:
        return ""
    parts = ["<h2>Configuration and environment" + (f", {run.name}" if named else "") + "</h2>"]
    rows = [[key.replace("_", " "), str(value)] for key, value in _flatten(run.environment).items()]
    if rows:
        parts.append(table(["environment", ""], rows, words=True))
    if len(run.starts) > 1:
        when = [time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start["time"])) for start in run.starts]
        starts = [
            [str(start.get("step")), moment, str(start.get("world_size", "-")), str(start.get("host", "-"))]
            for start, moment in zip(run.starts, when, strict=True)
        ]
        parts.append("<h2>Starts</h2>" + table(["from step", "time", "ranks", "host"], starts, words=True))
    if run.config:
        parts.append(fold("Configuration", yaml.safe_dump(run.config, sort_keys=False)))
    return "".join(parts)


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _four(value: float) -> str:
    return f"{value:.4f}"


def _loss_unit(value: float) -> str:
    return f"{value:.4g}"
