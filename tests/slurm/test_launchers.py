"""Conversion, evaluation, preprocessing and sweeps on a real SLURM, and what `megasparse status` says of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import STEPS, Workplace


def test_status_of_a_launched_run(place: Workplace, cluster: Cluster, limited: list[str]) -> None:
    job = limited[0]
    assert cluster.wait_for_end(job) == "COMPLETED", place.log("limited")
    status = json.loads(place.command("status", "runs/limited", "--json"))
    assert (status["job"], status["state"], status["step"], status["eta_seconds"]) == (job, "COMPLETED", 12, 0.0)
    assert status["requeues"] == 1
    assert status["loss"] == place.metrics("limited")[12]["loss/lm"]
    assert f"job {job}: COMPLETED" in place.command("status", "runs/limited")


def test_evaluate_follows_training_and_equals_one_process(
    place: Workplace, cluster: Cluster, limited: list[str]
) -> None:
    assert cluster.wait_for_end(limited[1]) == "COMPLETED", place.output("judged")
    alone = place.alone("evaluate", "runs/limited", "training.eval_steps=2")
    on_nodes, expected = (
        {name: float(value) for name, value in re.findall(r"(eval/\S+) +(\S+)$", text, re.MULTILINE)}
        for text in (place.output("judged"), alone)
    )
    assert set(expected) == {"eval/loss", "eval/ppl", "eval/l0", "eval/layer_0/l0", "eval/layer_1/l0"}
    assert 0 < expected["eval/loss"] < 10
    assert on_nodes == pytest.approx(expected, rel=1e-5)  # six digits are printed


def test_convert_follows_training(place: Workplace, cluster: Cluster, limited: list[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    assert cluster.wait_for_end(limited[2]) == "COMPLETED", place.output("exported")
    assert "verified: both compute the same" in place.output("exported")
    model = AutoModelForCausalLM.from_pretrained(place.directory / "exported model")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 64)
    tokens = torch.arange(1, 17).reshape(2, 8)
    assert math.isfinite(float(model(input_ids=tokens, labels=tokens).loss))


def test_preprocess_array_equals_one_process_for_each_share(
    place: Workplace, cluster: Cluster, tokenised: tuple[str, str]
) -> None:
    from megasparse.data.preprocess import PreprocessOptions, preprocess

    job, lost = tokenised
    raw = place.directory / "raw text"
    files = [raw / "a b.txt", raw / "more" / "part.txt", raw / "z.jsonl"]
    for task in range(2):
        assert cluster.wait_for_end(f"{job}_{task}") == "COMPLETED", place.output("tokenised")
        expected = place.directory / f"expected-{task}"
        share = [str(file) for file in files[task::2]]
        preprocess(PreprocessOptions(share, expected, tokenizer=str(place.directory / "words")))
        for ending in (".bin", ".idx"):
            written = place.directory / "data sets" / f"corpus-{task:05d}-of-00002{ending}"
            assert written.read_bytes() == Path(f"{expected}{ending}").read_bytes()
    assert cluster.wait_for_end(f"{lost}_0") == "FAILED"
    assert "no such folder: no such file or folder" in place.output("absent")


def test_sweep_separates_its_runs_and_requeues_one_alone(
    place: Workplace, cluster: Cluster, swept: str, signalled_task: None
) -> None:
    coefficients = ("1e-4", "3e-3")
    for task in range(2):
        assert cluster.wait_for_end(f"{swept}_{task}") == "COMPLETED", place.output("swept")
    assert [cluster.job(f"{swept}_{task}")["Restarts"] for task in range(2)] == ["0", "1"]
    names = [f"../sweep runs/coefficient-{coefficient}" for coefficient in coefficients]
    reasons = [[end["reason"] for end in place.ends(name)] for name in names]
    assert reasons == [["done"], ["SIGUSR1 after step 5", "done"]]
    runs = [place.metrics(name) for name in names]
    for run, coefficient in zip(runs, coefficients, strict=True):
        assert sorted(run) == list(range(1, STEPS + 1))
        assert run[STEPS]["l1/layer_0/coeff"] == run[STEPS]["l1/layer_1/coeff"] == pytest.approx(float(coefficient))
    assert runs[0][1]["loss/lm"] == runs[1][1]["loss/lm"]  # the same start
    assert runs[0][STEPS]["loss/lm"] != runs[1][STEPS]["loss/lm"]
