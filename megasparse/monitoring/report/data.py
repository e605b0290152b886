"""Reading a run's metrics into series and layer-by-time grids."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megasparse.monitoring import environment
from megasparse.monitoring.record import Record, read_records
from megasparse.monitoring.sinks.jsonl import FILE_NAME
from megasparse.small_files import read_json

Points = list[tuple[float, float]]
"""(step, value), in order of step; NaN where a value was not finite."""


class ReportError(Exception):
    """A directory holds no metrics to report on, or the report cannot be written."""


@dataclass
class Grid:
    """A metric of every layer over time: `values[layer][column]`, NaN where not logged."""

    steps: list[float]
    layers: list[int]
    values: list[list[float]]

    def finite(self) -> list[float]:
        return [value for row in self.values for value in row if math.isfinite(value)]


class Run:
    """One training run as its directory shows it."""

    def __init__(self, directory: Path) -> None:
        """Raises ReportError where `directory` holds no metrics.jsonl with a training record."""
        path = directory / FILE_NAME
        records = list(read_records(path))
        self.train: list[Record] = [record for record in records if record.split == "train"]
        self.valid: list[Record] = [record for record in records if record.split == "valid"]
        if not self.train:
            raise ReportError(
                f"{path}: no training record to report on; give the directory that a run wrote its metrics.jsonl to "
                "(logging.directory, by default the run directory)"
            )
        described = read_json(directory / environment.FILE_NAME)
        self.config: dict[str, Any] = described.get("config", {})
        self.environment: dict[str, Any] = described.get("environment", {})
        self.starts: list[dict[str, Any]] = described.get("starts", [])
        self.name: str = self.config.get("run", {}).get("name") or directory.resolve().name
        names = {name for record in self.train for name in record.metrics}
        found = (re.match(r"(?:sparsity|memory)/layer_(\d+)/", name) for name in names)
        self.layers = sorted({int(match[1]) for match in found if match})

    @property
    def last_step(self) -> int:
        return max(record.step for record in [*self.train, *self.valid])

    @property
    def total_steps(self) -> int | None:
        return self.config.get("training", {}).get("steps")

    @property
    def ffn_width(self) -> int | None:
        return self.config.get("model", {}).get("ffn_hidden_size")

    @property
    def resumed_steps(self) -> list[int]:
        return [start["step"] for start in self.starts if start.get("step")]

    @property
    def tokens_a_step(self) -> float:
        """Of the whole run; 0 where it was not logged."""
        tokens = self.points("progress/tokens")
        return tokens[-1][1] / tokens[-1][0] if tokens and tokens[-1][0] else 0.0

    def over_tokens(self, points: Points) -> Points:
        """Points over steps as points over the tokens seen by then; [] where these were not logged."""
        seen = self.points("progress/tokens")
        if not seen:
            return []
        steps, tokens = ([0.0, *(point[i] for point in seen)] for i in (0, 1))
        found = np.interp([step for step, _ in points], steps, tokens)
        return [(round(x), y) for x, (_, y) in zip(found.tolist(), points, strict=True)]

    def points(self, name: str, split: str = "train") -> Points:
        """The metric over steps; [] where it was never logged."""
        records = self.train if split == "train" else self.valid
        return [(record.step, number(record.metrics[name])) for record in records if name in record.metrics]

    def last(self, name: str, split: str = "train") -> float | None:
        """Newest finite value, or None."""
        for record in reversed(self.train if split == "train" else self.valid):
            if math.isfinite(value := number(record.metrics.get(name))):
                return value
        return None

    def last_text(self, name: str) -> str | None:
        """Newest value of a metric that is a word (`path`)."""
        for record in reversed(self.train):
            if isinstance(value := record.metrics.get(name), str):
                return value
        return None

    def typical(self, name: str) -> float | None:
        """Median of the last half of the training records: of a rate, without start-up; None where not logged."""
        points = self.points(name)
        values = sorted(value for _, value in points[len(points) // 2 :] if math.isfinite(value))
        return values[len(values) // 2] if values else None

    def mean_over_layers(self, metric: str) -> Points:
        """Mean over layers of `sparsity/layer_{i}/<metric>` over steps."""
        grid = self.grid(metric)
        result = []
        for column, step in enumerate(grid.steps):
            values = [row[column] for row in grid.values if math.isfinite(row[column])]
            if values:
                result.append((step, sum(values) / len(values)))
        return result

    def grid(self, metric: str, prefix: str = "sparsity") -> Grid:
        """`<prefix>/layer_{i}/<metric>` of all layers at the training steps where any of them was logged."""
        names = [f"{prefix}/layer_{layer}/{metric}" for layer in self.layers]
        records = [record for record in self.train if any(name in record.metrics for name in names)]
        values = [[number(record.metrics.get(name)) for record in records] for name in names]
        return Grid([record.step for record in records], self.layers, values)


def number(value: object) -> float:
    """NaN for what is not a number (`null` stands for a value that was not finite)."""
    return float(value) if isinstance(value, int | float) else math.nan
