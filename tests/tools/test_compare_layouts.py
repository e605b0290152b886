"""The comparison of parallel layouts: a run of one process and one of two pipeline stages on the CPU, and one that
cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.cases import configuration

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


def test_layouts_are_compared_and_a_failure_stops_nobody(tmp_path: Path, data_folder: Path) -> None:
    # Sequences so short that some neurons fire for no token of a tile.
    config = configuration(tmp_path / "run", str(data_folder / "a"), sparsity={"path": "sparse"})
    config["data"]["sequence_length"] = 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    prefix = tmp_path / "out" / "layouts"
    command = [
        sys.executable, "tools/compare_layouts.py", str(tmp_path / "config.yaml"), "--gpus", "3",
        "--layout", "one", "1", "--layout", "PP 2 interleaved", "2", "parallel.pipeline=2",
        "parallel.virtual_pipeline=2", "--layout", "PP 3", "1", "parallel.pipeline=3", "--set", "training.steps=20",
        "--curve", str(STEPS), "--rounds", "1", "--steps", "1",
        "--runs", str(tmp_path / "runs"), "--output", str(prefix),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: PP 3" in done.stderr

    layouts = json.loads(prefix.with_suffix(".json").read_text())["layouts"]
    assert list(layouts) == ["one", "PP 2 interleaved"]
    one, pipelined = layouts.values()
    assert [row["step"] for row in one["curve"]] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in one["curve"]}) == STEPS
    for key in ("loss", "grad_norm"):
        expected = [row[key] for row in one["curve"]]
        assert [row[key] for row in pipelined["curve"]] == pytest.approx(expected, rel=1e-5)
    # Of all layers, not of one stage's alone.
    assert [layer["path"] for layer in pipelined["layers"]] == ["sparse"] * 4
    assert [layer["l0"] for layer in pipelined["layers"]] == pytest.approx([layer["l0"] for layer in one["layers"]])
    for layout, stages in ((one, [0]), (pipelined, [0, 1])):
        for variant in layout["variants"].values():
            assert variant["tokens_per_second"]["median"] > 0
            assert variant["breakdown"]["parts"]["head and loss"] > 0  # on the last stage, in the mean over ranks
            ranks = variant["memory"]["ranks"]
            assert [rank["stage"] for rank in ranks] == stages
            for rank in ranks:
                assert rank["measured"]["weights"] == rank["estimate"]["weights"]
    sparse, sparse_pipelined = (layout["variants"]["sparse"]["metrics"] for layout in (one, pipelined))
    share = sparse["perf/executed_tflops_per_gpu"] / sparse["throughput/tflops_per_gpu"]
    assert share < 1
    assert sparse_pipelined["perf/executed_tflops_per_gpu"] == pytest.approx(
        share * sparse_pipelined["throughput/tflops_per_gpu"]
    )
    table = prefix.with_suffix(".md").read_text()
    assert "| PP 2 interleaved | 2 |" in table
    assert prefix.with_suffix(".png").stat().st_size > 0
