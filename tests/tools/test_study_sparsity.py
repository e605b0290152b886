"""tools/study_sparsity.py: two variants with two seeds of a tiny model, their tables, and going on from what exists."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import benchmark_mlp
import pytest
import study_sparsity
import yaml

from tests.training.cases import configuration

TARGET = ("sparsity.l1.mode=target", "sparsity.l1.target_l0=4", "sparsity.l1.coeff=0.3")


def words(folder: Path, *more: str, runs: str = "runs") -> list[str]:
    return [
        str(folder / "config.yaml"), "--runs", str(folder / runs), "--output", str(folder / "out" / "study 1.0"),
        "--gpus", "2", "--variant", "no L1", "sparsity.l1.mode=off", "--variant", "target 4", *TARGET, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """A finished study with seeds 1 and 2."""
    folder = tmp_path_factory.mktemp("study")
    config = configuration(folder / "unused", str(data_folder / "a"), training={"eval_steps": 2, "steps": 30})
    config["logging"] = {"interval": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert study_sparsity.main(words(folder, "--seeds", "1", "2")) == 0
    return folder


def test_figures_are_those_of_the_runs(study: Path) -> None:
    runs = json.loads((study / "out" / "study 1.0.json").read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [
        ("no L1", 1), ("target 4", 1), ("no L1", 2), ("target 4", 2),
    ]  # fmt: skip
    for run in runs:
        folder = study / "runs" / f"{run['variant'].lower().replace(' ', '-')}-s{run['seed']}"
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert run["finished"]
        assert run["eval_loss"] == next(row for row in reversed(records) if row["split"] == "valid")["eval/loss"]
        assert len(run["eval_curve"]) == 10
        last = [row for row in records if row["split"] == "train" and row["step"] > 28.5]
        for index, layer in enumerate(run["layers"]):
            for key in ("l0", "union_fraction", "dead_fraction"):
                values = [row[f"sparsity/layer_{index}/{key}"] for row in last]
                assert layer[key] == pytest.approx(sum(values) / len(values))
        assert run["tokens_per_second"]["run"] > 0
        assert len(list((folder / "checkpoints").glob("step_*"))) == 1
    assert runs[0]["eval_loss"] != runs[2]["eval_loss"]
    l0 = [sum(layer["l0"] for layer in run["layers"]) for run in runs]
    assert l0[1] < 0.8 * l0[0]


def test_tables_and_plot(study: Path) -> None:
    text = (study / "out" / "study 1.0.md").read_text()
    runs = json.loads((study / "out" / "study 1.0.json").read_text())["runs"]
    row = next(line for line in text.splitlines() if line.startswith("| target 4 | 1 2 |"))
    differences = [runs[1]["eval_loss"] - runs[0]["eval_loss"], runs[3]["eval_loss"] - runs[2]["eval_loss"]]
    assert f"{sum(differences) / 2:+.4f} [{min(differences):+.4f}, {max(differences):+.4f}]" in row
    assert "Not finished" not in text
    assert (study / "out" / "study 1.0.png").stat().st_size > 0


def test_goes_on_from_what_exists(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = {path: path.stat().st_mtime_ns for path in study.glob("runs/*/console.log")}
    assert study_sparsity.main(words(study, "--seeds", "1", "2")) == 0
    assert {path: path.stat().st_mtime_ns for path in study.glob("runs/*/console.log")} == logs
    assert study_sparsity.main(words(study, "--seeds", "1", "--set", "training.steps=31")) == 2
    assert "training.steps 30 -> 31" in capsys.readouterr().err


def test_goes_on_from_its_own_output(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the directories of its runs, as on another machine."""
    whole = (study / "out" / "study 1.0.md").read_text()
    assert study_sparsity.main(words(study, "--seeds", "1", "2", runs="elsewhere")) == 0
    assert not list(study.glob("elsewhere/*"))
    assert (study / "out" / "study 1.0.md").read_text() == whole
    assert study_sparsity.main(words(study, "--set", "optimizer.lr=0.5", runs="elsewhere")) == 2
    assert "study 1.0.json: holds a run with other settings: optimizer.lr" in capsys.readouterr().err


def test_redraws_from_records_alone_with_runs_missing(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (study / "out" / "study 1.0.md").read_text()
    for folder in (study / "runs").iterdir():
        copy = study / "copied" / folder.name
        copy.mkdir(parents=True)
        for name in ("run.json", "metrics.jsonl", "exit_code"):
            shutil.copy(folder / name, copy / name)
    assert study_sparsity.main(words(study, "--table-only", "--seeds", "1", "2", runs="copied")) == 0
    assert (study / "out" / "study 1.0.md").read_text() == whole
    shutil.rmtree(study / "copied" / "target-4-s2")
    (study / "out" / "study 1.0.json").unlink()
    assert study_sparsity.main(words(study, "--table-only", "--seeds", "1", "2", "3", runs="copied")) == 0
    text = (study / "out" / "study 1.0.md").read_text()
    assert "Not finished: target 4, seed 2; no L1, seed 3; target 4, seed 3." in text
    assert "| target 4 | 1 |" in text


@pytest.mark.parametrize(("layers", "column"), [(4, True), (3, False)])
def test_mlp_times_count_when_all_layers_have_been_timed(study: Path, layers: int, column: bool) -> None:
    mlp = study / "runs" / "target-4-s1" / "mlp"
    mlp.mkdir(exist_ok=True)
    sums = {"layers": layers, "auto_speedup": 2.5}
    (mlp / "results.json").write_text(json.dumps({"sums_over_layers": [sums]}))
    assert study_sparsity.main(words(study, "--table-only")) == 0
    shutil.rmtree(mlp)
    text = (study / "out" / "study 1.0.md").read_text()
    assert ("MLPs, compiled dense = 1" in text) is column
    assert ("| 2.50x |" in text) is column


def test_mlps_are_timed_where_there_is_a_checkpoint(study: Path) -> None:
    overrides = ("training.seed=1", "run.name=x", *TARGET)
    for runs, count in (("runs", 2), ("nowhere", 2), ("finished-elsewhere", 1)):
        folder = study / runs / "target-4-s1"
        run = study_sparsity.StudyRun("target 4", 1, folder, (*overrides, f"run.directory={folder}"))
        if runs == "finished-elsewhere":
            folder.mkdir(parents=True)
            (folder / "exit_code").write_text("0\n")
        arguments = Namespace(config=str(study / "config.yaml"), mlp=True, output=study / "out" / "other")
        training, *mlp = study_sparsity.jobs_of(run, arguments, {})
        assert 1 + len(mlp) == count
        for job in mlp:
            assert job.after == training
            assert "16,16,32" in job.command


def test_sum_over_layers_takes_the_path_of_the_router() -> None:
    def row(name: str, path: str, *milliseconds: float) -> dict[str, object]:
        results = {
            key: {"both_ms": {"median": value}}
            for key, value in zip(("compile", "ours dense", "ours sparse"), milliseconds, strict=True)
        }
        return {"name": name, "shape": {"tokens": 8}, "auto_path": path, "results": results}

    rows = [
        row("uniform 10", "sparse", 9, 9, 9),
        row("captured 0", "dense", 4, 5, 7),
        row("captured 1", "sparse", 6, 5, 1),
    ]
    (sums,) = benchmark_mlp.sums_over_layers(rows)
    assert (sums["layers"], sums["compile_ms"], sums["sparse_ms"], sums["auto_ms"]) == (2, 10, 8, 6)
    assert sums["auto_sparse_layers"] == 1
    assert sums["auto_speedup"] == pytest.approx(10 / 6)
