"""Conversion, evaluation, preprocessing and sweeps on a real SLURM, and two training jobs on the same nodes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, STEPS, Workplace

EXPORT = "exported model"


def output(place: Workplace, name: str) -> str:
    """What the batch scripts of a job name printed."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(place.directory.glob(f"slurm-{name}-*.out")))


@pytest.fixture(scope="module")
def pair(place: Workplace, cluster: Cluster) -> tuple[str, str, str]:
    """Two training jobs that run at the same time on n1 and n2, and a conversion that waits for the first."""
    both = ("first", "second")
    first, second = (place.submit(name, hold=6, flags=("--nodelist=n1,n2",)) for name in both)
    convert = place.submit(
        "exported", EXPORT, "--verify", "--verify-tokens=64", script="convert.sbatch", config="runs/first", nodes=1,
        flags=(f"--dependency=afterok:{first}", "--cpus-per-task=1"),
    )  # fmt: skip
    for name in both:
        place.wait_for_hold(name)
    assert [cluster.state(job) for job in (first, second, convert)] == ["RUNNING", "RUNNING", "PENDING"]
    assert cluster.job(convert)["Reason"] == "Dependency"
    assert cluster.job(first)["NodeList"] == cluster.job(second)["NodeList"] == "n[1-2]"
    for name in both:
        place.release(name)
    return first, second, convert


def test_two_jobs_share_nodes(place: Workplace, cluster: Cluster, pair: tuple[str, str, str]) -> None:
    for job, name in zip(pair, ("first", "second"), strict=False):
        assert cluster.wait_for_end(job) == "COMPLETED", place.log(name)
        assert max(place.metrics(name)) == STEPS
        assert place.ends(name)[-1]["reason"] == "done"
        assert cluster.job(job)["Restarts"] == "0"
    ports = [re.findall(r"rendezvous \S+:(\d+)", place.log(name)) for name in ("first", "second")]
    assert len(ports[0]) >= 1
    assert set(ports[0]).isdisjoint(ports[1])
    losses = [[record["loss/lm"] for record in place.metrics(name).values()] for name in ("first", "second")]
    assert losses[0] == losses[1]


def test_convert_follows_training(place: Workplace, cluster: Cluster, pair: tuple[str, str, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    assert cluster.wait_for_end(pair[2]) == "COMPLETED", output(place, "exported")
    assert "verified: both compute the same" in output(place, "exported")
    model = AutoModelForCausalLM.from_pretrained(place.directory / EXPORT)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 64)
    tokens = torch.arange(1, 17).reshape(2, 8)
    assert math.isfinite(float(model(input_ids=tokens, labels=tokens).loss))


def test_evaluate_on_two_nodes_equals_one_process(
    place: Workplace, cluster: Cluster, pair: tuple[str, str, str]
) -> None:
    assert cluster.wait_for_end(pair[0]) == "COMPLETED", place.log("first")
    job = place.submit("evaluated", "training.eval_steps=2", script="evaluate.sbatch", config="runs/first")
    alone = subprocess.run(
        [sys.executable, "-m", "megasparse", "evaluate", "runs/first", "training.eval_steps=2"],
        cwd=place.directory, capture_output=True, text=True, timeout=120, check=True,
        env={**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert cluster.wait_for_end(job) == "COMPLETED", output(place, "evaluated")
    on_nodes, expected = (
        {name: float(value) for name, value in re.findall(r"(eval/\S+) +(\S+)$", text, re.MULTILINE)}
        for text in (output(place, "evaluated"), alone.stdout)
    )
    assert set(expected) == {"eval/loss", "eval/ppl", "eval/l0", "eval/layer_0/l0", "eval/layer_1/l0"}
    assert 0 < expected["eval/loss"] < 10
    assert on_nodes == pytest.approx(expected, rel=1e-5)  # six digits are printed


def test_preprocess_array_equals_one_process_for_each_share(place: Workplace, cluster: Cluster) -> None:
    from megasparse.data.preprocess import PreprocessOptions, preprocess

    raw = place.directory / "raw text"
    (raw / "more").mkdir(parents=True)
    files = [raw / "a b.txt", raw / "more" / "part.txt", raw / "z.jsonl"]
    files[0].write_text("the sun rises over the quiet hills\n" * 20)
    files[1].write_text("water runs down to the sea\n" * 30)
    files[2].write_text('{"text": "one line"}\n{"text": "another line of text"}\n' * 10)
    words = place.directory / "words"
    preprocess(PreprocessOptions([str(raw)], place.directory / "all", train_vocab_size=300, tokenizer_output=words))
    job = place.submit(
        "tokenised", "raw text", "--tokenizer", "words", script="preprocess.sbatch", config="data sets/corpus",
        nodes=1, flags=("--array=0-1", "--cpus-per-task=2"),
    )  # fmt: skip
    lost = place.submit(
        "absent", "no such folder", "--tokenizer", "words", script="preprocess.sbatch", config="data sets/none",
        nodes=1, flags=("--array=0", "--cpus-per-task=1"),
    )  # fmt: skip
    for task in range(2):
        assert cluster.wait_for_end(f"{job}_{task}") == "COMPLETED", output(place, "tokenised")
        expected = place.directory / f"expected-{task}"
        share = [str(file) for file in files[task::2]]
        preprocess(PreprocessOptions(share, expected, tokenizer=str(words)))
        for ending in (".bin", ".idx"):
            written = place.directory / "data sets" / f"corpus-{task:05d}-of-00002{ending}"
            assert written.read_bytes() == Path(f"{expected}{ending}").read_bytes()
    assert cluster.wait_for_end(f"{lost}_0") == "FAILED"
    assert "no such folder: no such file or folder" in output(place, "absent")


def test_sweep_separates_the_runs_of_a_config_with_a_directory(place: Workplace, cluster: Cluster) -> None:
    coefficients = ("1e-4", "3e-3")
    job = place.submit(
        "coefficients", "run.directory=sweep runs/coefficient", script="sweep.sbatch", nodes=1,
        flags=("--array=0-1",), MEGASPARSE_SWEEP_VALUES=" ".join(coefficients),
    )  # fmt: skip
    for task in range(2):
        assert cluster.wait_for_end(f"{job}_{task}") == "COMPLETED", output(place, "coefficients")
    runs = [place.metrics(f"../sweep runs/coefficient-{coefficient}") for coefficient in coefficients]
    for run, coefficient in zip(runs, coefficients, strict=True):
        assert sorted(run) == list(range(1, STEPS + 1))
        assert run[STEPS]["l1/layer_0/coeff"] == run[STEPS]["l1/layer_1/coeff"] == pytest.approx(float(coefficient))
    assert runs[0][1]["loss/lm"] == runs[1][1]["loss/lm"]  # the same start
    assert runs[0][STEPS]["loss/lm"] != runs[1][STEPS]["loss/lm"]
