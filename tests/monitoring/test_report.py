"""Reports of recorded metrics: what they hold, and that a browser would need nothing else."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megasparse.monitoring.environment import record_start
from megasparse.monitoring.record import Record
from megasparse.monitoring.report import ReportError, write_report
from megasparse.monitoring.report.charts import Series, bar_chart, byte_size, line_chart, percent, ramp, short
from megasparse.monitoring.report.page import STYLE
from megasparse.monitoring.sinks.jsonl import FILE_NAME, JsonlSink

LAYERS, WIDTH = 3, 64


def recorded(directory: Path, name: str, l1: float = 2e-5, steps: int = 40) -> Path:
    """A run's directory as the monitor leaves it; L0 of layer i at step s is 10 (i + 1) + 20 / s."""
    sink = JsonlSink(directory)
    config = {"run": {"name": name}, "model": {"ffn_hidden_size": WIDTH}, "sparsity": {"l1": {"coeff": l1}}}
    record_start(directory, config, {"world_size": 2, "git_commit": "c0ffee"}, 0)
    record_start(directory, config, {"world_size": 2, "git_commit": "c0ffee"}, 20)
    for step in range(1, steps + 1):
        metrics: dict[str, Any] = {
            "loss/lm": 2.0 + 3.0 / step, "loss/l1": l1 * 9, "lr": 1e-3, "grad_norm": 1.0 / step, "l1/coeff": l1,
            "throughput/tokens_per_second": 5000.0, "progress/tokens": 100 * step, "memory/rss_bytes": 3 * 2**28,
        }  # fmt: skip
        for layer in range(LAYERS):
            l0 = 10.0 * (layer + 1) + 20.0 / step
            metrics |= {
                f"sparsity/layer_{layer}/l0": l0, f"sparsity/layer_{layer}/density": l0 / WIDTH,
                f"sparsity/layer_{layer}/dead_fraction": 0.125 * layer, f"sparsity/layer_{layer}/l1": l0 / 2,
                f"sparsity/layer_{layer}/union_fraction": 0.5, f"sparsity/layer_{layer}/path": "sparse",
                f"l1/layer_{layer}/coeff": l1, f"memory/layer_{layer}/saved_bytes": (layer + 1) * 2**20,
                f"memory/layer_{layer}/peak_bytes": (layer + 2) * 2**20,
            }  # fmt: skip
        sink.write(Record(step, 0.0, "train", metrics))
        if step % 10 == 0:
            sink.write(Record(step, 0.0, "valid", {"eval/loss": 2.5 + 1 / step, "eval/ppl": math.exp(2.5 + 1 / step)}))
    sink.close()
    return directory


class _Page(HTMLParser):
    """Figures, table cells and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, Any] = {}
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self._chart: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag == "figure":
            self._chart = found.get("data-chart")
        if tag == "svg" and found.get("aria-label"):
            self.figures[str(found["aria-label"])] = json.loads(self._chart) if self._chart else None
        if tag not in ("meta", "line", "rect", "path", "circle", "stop"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "rect", "path", "circle", "stop"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_a_report_holds_what_it_promises(tmp_path: Path) -> None:
    path = write_report(recorded(tmp_path, "tiny"))
    assert path == tmp_path / "report.html"
    text = path.read_text()
    page = _Page(text)
    assert page.open == []
    assert set(page.figures) >= {
        "Cross entropy, nats per token", "L1 term of the loss", "L0: active neurons per token",
        "L0 per layer over time", "Dead neurons per layer over time", "MLP memory per layer, last sample",
        "Tokens per second", "Learning rate", "Gradient norm before clipping",
    }  # fmt: skip
    loss = {series["name"]: series["p"] for series in page.figures["Cross entropy, nats per token"]["series"]}
    assert [point[:2] for point in loss["validation"]] == [[10, "2.6"], [20, "2.55"], [30, "2.533"], [40, "2.525"]]
    assert loss["training"][0][:2] == [1, "5"]
    heat = page.figures["L0 per layer over time"]
    assert heat["layers"] == [0, 1, 2]
    assert heat["steps"] == list(range(1, 41))
    assert heat["v"][1][3] == "25"  # layer 1, step 4: 20 + 20 / 4
    dead = page.figures["Dead neurons per layer over time"]["v"]
    assert [row[-1] for row in dead] == ["0 %", "12.5 %", "25 %"]
    for cell in ("30.5", "sparse", "2 MiB", "c0ffee", "2e-5"):
        assert cell in page.cells
    for remark in ("validation loss", "2.5250", "mean L0", "20.5", "768 MiB", "ffn_hidden_size: 64", "Starts"):
        assert remark in text


def test_a_report_needs_no_other_file(tmp_path: Path) -> None:
    text = write_report(recorded(tmp_path, "tiny")).read_text()
    assert _Page(text).addresses == []
    assert not re.search(r"@import|url\((?!#)|<link|<script src|<iframe", text)
    without_namespace = text.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in without_namespace


def test_names_from_outside_are_text_not_markup(tmp_path: Path) -> None:
    text = write_report(recorded(tmp_path, "<script>alert(1)</script>")).read_text()
    assert "<script>alert" not in text


def test_several_runs_are_compared_in_the_same_charts(tmp_path: Path) -> None:
    first = recorded(tmp_path / "a", "with L1")
    second = recorded(tmp_path / "b", "without", l1=0.0)
    path = write_report(first, second, output=tmp_path / "both.html")
    page = _Page(path.read_text())
    names = [series["name"] for series in page.figures["Cross entropy, nats per token"]["series"]]
    assert names == ["with L1: training", "with L1: validation", "without: training", "without: validation"]
    assert {"with L1: L0 per layer over time", "without: L0 per layer over time"} <= set(page.figures)
    difference = page.cells.index("sparsity.l1.coeff")
    assert page.cells[difference + 1 : difference + 3] == ["2e-05", "0.0"]


def test_runs_of_different_batches_are_compared_over_tokens_too(tmp_path: Path) -> None:
    """At the same step, one of them has seen twice as much."""
    small, large = recorded(tmp_path / "a", "small"), recorded(tmp_path / "b", "large")
    title = "Cross entropy over tokens seen"
    assert title not in _Page(write_report(small, large).read_text()).figures
    lines = [json.loads(line) for line in (large / FILE_NAME).read_text().splitlines()]
    for line in lines:
        if line["split"] == "train":
            line["progress/tokens"] *= 2
    (large / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    chart = _Page(write_report(small, large).read_text()).figures[title]
    assert chart["over"] == "tokens"
    found = {series["name"]: [point[0] for point in series["p"]] for series in chart["series"]}
    assert found["small: validation"] == [1000, 2000, 3000, 4000]
    assert found["large: validation"] == [2000, 4000, 6000, 8000]
    assert found["large: training"][:2] == [200, 400]


def test_skipped_steps_are_told_where_there_are_some(tmp_path: Path) -> None:
    assert "skipped steps" not in write_report(recorded(tmp_path, "tiny")).read_text()
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step":41,"time":0,"split":"train","loss/lm":null,"optim/skipped_steps":3}\n')
    assert '<span class="quiet">skipped steps</span><b>3</b>' in write_report(tmp_path).read_text()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    path = write_report(recorded(tmp_path / "a", "x"), recorded(tmp_path / "b", "x"))
    assert "x (1)" in path.read_text()
    assert "x (2)" in path.read_text()


def test_a_long_run_of_many_layers_stays_small(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step in range(10, 20010, 10):
        metrics = {f"sparsity/layer_{layer}/l0": 10.0 + (step * 7919 % 97) + layer for layer in range(48)}
        sink.write(Record(step, 0.0, "train", {"loss/lm": 3.0 + 1 / step, **metrics}))
    sink.close()
    assert write_report(tmp_path).stat().st_size < 2_000_000


def test_a_run_killed_mid_line_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    recorded(tmp_path, "tiny")
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step":41,"time":0,"split":"train","loss/lm":null,"lr":0.001}\n{"step":42,"ti')
    page = _Page(write_report(tmp_path).read_text())
    training = page.figures["Cross entropy, nats per token"]["series"][0]["p"]
    assert training[-1][0] == 40
    assert page.figures["Learning rate"]["series"][0]["p"][-1][0] == 41


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    recorded(tmp_path, "tiny")
    (tmp_path / "run.json").unlink()
    assert "Cross entropy" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("content", [None, "", '{"step":1,"time":0,"split":"valid","eval/loss":1.0}\n', "not json\n"])
def test_no_training_metrics_is_an_error_that_names_the_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ReportError, match=r"metrics\.jsonl: no training record"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_charts_of_degenerate_data() -> None:
    assert line_chart("t", []) == ""
    assert line_chart("t", [Series("a", [(1, math.nan)], 0)]) == ""
    for points in ([(1, 5.0)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 1e9)], [(1, -3.0), (2, math.nan), (3, 4.0)]):
        for log in (False, True):
            figure = line_chart("t", [Series("a", points, 0)], log=log)
            assert "nan" not in re.sub(r'data-chart="[^"]*"', "", figure)
            assert "<path" in figure


def test_many_runs_are_drawn_in_colours_that_there_are() -> None:
    bars = [(f"run {number}", [1.0, 2.0]) for number in range(8)]
    lines = [Series(f"run {number}", [(1, 1.0)], number) for number in range(8)]
    for figure in (bar_chart("t", ["0", "1"], bars, unit=byte_size), line_chart("t", lines)):
        used = set(re.findall(r'class="[^"]*\b(c\d+)\b', figure))
        assert used == set(re.findall(r"\.(c\d)\{", STYLE))


def test_numbers_as_text() -> None:
    values = [0.0, 2.5, 12345.0, 3.2e6, 2e-5, math.nan]
    assert [short(value) for value in values] == ["0", "2.5", "12.3k", "3.2M", "2e-5", "-"]
    assert [byte_size(value) for value in (100, 1536, 3 * 2**29)] == ["100 B", "1.5 KiB", "1.5 GiB"]
    assert percent(0.1234) == "12.3 %"
    assert (ramp(0.0), ramp(1.0), ramp(7.0)) == ("#440154", "#fde725", "#fde725")
