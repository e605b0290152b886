"""The benchmark of whole steps: trains, grows, measures and reports a tiny model on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.cases import configuration

ROOT = Path(__file__).resolve().parents[2]
TRIED = (
    "gradient_accumulation_fusion=False",
    "recompute_granularity=full,recompute_method=uniform,recompute_num_layers=1",
    "checkpoint_core_attention=True",
    "dense:recompute_mlp=True",
)


def test_trains_grows_measures_and_reports(tmp_path: Path, data_folder: Path) -> None:
    config = configuration(tmp_path / "run", str(data_folder / "a"))
    config["model"] |= {"hidden_size": 32, "ffn_hidden_size": 128}
    config["sparsity"] = {"path": "sparse", "l1": {"mode": "target", "target_l0": 16, "coeff": 3e-3}}
    config["training"]["steps"] = 200
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    command = [
        sys.executable, "tools/benchmark_pretrain.py", str(tmp_path / "config.yaml"), "optimizer.lr=1e-3",
        "--train-minutes", "0.03", "--train-layers", "2", "--train-batch", "2", "--settle-minutes", "0.01",
        "--baseline", "megatron", *(word for text in TRIED for word in ("--try", text)),
        "--rounds", "2", "--steps", "1", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    record = json.loads((out / "results.json").read_text())
    assert [stage["layers"] for stage in record["sparsity_from"]] == [2, 4]
    assert len(record["layers"]) == 4
    assert all(0 < row["l0"] < 128 and row["path"] == "sparse" for row in record["layers"])
    variants = record["variants"]
    attempts = [f"sparse, {text}" for text in TRIED[:-1]] + ["dense, recompute_mlp=True"]
    assert list(variants) == [
        "dense", "sparse", *attempts, "sparse, micro-batch 2", "megatron", "megatron, SwiGLU",
    ]  # fmt: skip
    # The same function of the same weights on the same samples, whatever computes it.
    losses = {name: variants[name]["windows"][0]["loss"] for name in ("dense", "sparse", *attempts, "megatron")}
    assert list(losses.values()) == pytest.approx([losses["dense"]] * len(losses), rel=1e-5)
    # Recomputation repeats the same operations.
    assert {losses[name] for name in attempts[1:3]} == {losses["sparse"]}
    assert losses["dense, recompute_mlp=True"] == losses["dense"]
    assert variants["megatron, SwiGLU"]["windows"][0]["loss"] != pytest.approx(losses["dense"], rel=1e-5)
    # And the weights stay where they are: the loss of the next window is that of other samples alone.
    later = [variants[name]["windows"][1]["loss"] for name in ("dense", "sparse", "megatron")]
    assert later == pytest.approx([later[0]] * 3, rel=1e-5)
    for name in ("dense", "sparse"):
        row = variants[name]
        assert row["tokens_per_second"]["median"] > 0
        parts = row["breakdown"]["parts"]
        assert min(parts[part] for part in ("attention", "MLP", "norms", "head and loss", "optimizer")) > 0
        measured, estimate = row["memory"]["measured"], row["memory"]["estimate"]
        for part in ("weights", "gradients", "optimizer"):
            assert measured[part] == pytest.approx(estimate[part], rel=0.02)
    tables = (out / "tables.txt").read_text()
    for text in ("tokens/s/GPU", "where a step's time goes", "memory of a step", "union / width"):
        assert text in tables
    assert (out / "results.png").stat().st_size > 0


def test_a_configuration_that_does_not_fit_is_refused_in_words(tmp_path: Path, data_folder: Path) -> None:
    config = configuration(tmp_path / "run", str(data_folder / "a"), training={"micro_batch_size": 3})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "tools/benchmark_pretrain.py", str(tmp_path / "config.yaml"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "training.global_batch_size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("attempts", "message"),
    [
        (["dense:recompute_mlp"], "'recompute_mlp' is not KEY=VALUE"),
        (["fp8=hybrid", "fp8=hybrid,fp8_recipe=tensorwise"], "in a call of its own"),
    ],
)
def test_variants_that_cannot_be_are_refused_in_words(attempts: list[str], message: str, tmp_path: Path) -> None:
    words = [word for text in attempts for word in ("--try", text)]
    command = [
        sys.executable,
        "tools/benchmark_pretrain.py",
        "configs/paper-0.5b.yaml",
        "model.vocab_size=256",
        *words,
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
