"""`evaluate` of models in Hugging Face format: the figures of the checkpoint that they were made from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM

from megasparse.config import ConfigError
from megasparse.data.preprocess import PreprocessOptions, preprocess
from megasparse.hf.errors import ConvertError
from megasparse.hf.from_hf import FromHf, convert_from_hf
from megasparse.training.evaluate_hf import evaluate_folder
from tests.commands import Commands
from tests.hf.cases import VOCABULARY
from tests.hf.test_from_hf import make_model, publish, rewrite
from tests.launch import run_distributed
from tests.training.cases import write_data

SIZE = ("data.sequence_length=16", "data.num_workers=0", "training.eval_steps=3", "training.global_batch_size=4")


def evaluate_both(folder: str, checkpoint: str, overrides: list[str]) -> list[Any]:
    from megasparse.training.evaluate import evaluate

    found = [evaluate_folder(Path(folder), overrides), evaluate(checkpoint, overrides)]
    if dist.get_world_size() == 2:  # the second rank then holds nothing but padding of the vocabulary
        found.append(evaluate(checkpoint, [*overrides, "parallel.tensor=2"]))
    return found


@pytest.mark.parametrize(("name", "world"), [("llama-untied-gqa-scaled", 2), ("arcee", 1), ("published", 1)])
def test_both_formats_give_the_same(name: str, world: int, tmp_path: Path) -> None:
    if name == "published":
        publish(tmp_path / "in", gated=True, layout="by-neuron")
    else:
        make_model(name, tmp_path / "in")
    convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    overrides = [
        f"data.valid={write_data(tmp_path / 'text', 40, seed=0)}", f"data.cache_dir={tmp_path / 'cache'}", *SIZE,
    ]  # fmt: skip
    found = run_distributed(
        world, "tests.training.test_evaluate_hf:evaluate_both", str(tmp_path / "in"), str(tmp_path / "checkpoint"),
        overrides,
    )  # fmt: skip
    # Of what is named for training too, for want of other data, nothing is indexed: a run may have billions of samples.
    assert [path.name for path in (tmp_path / "cache").glob("*-train-*")] == []
    for of_folder, *of_checkpoints in found:
        assert len(of_checkpoints) == world
        for of_checkpoint in of_checkpoints:
            assert of_folder.keys() == of_checkpoint.keys()
            assert of_folder == pytest.approx(of_checkpoint, rel=1e-5)
        assert 0 < of_folder["eval/layer_3/l0"] < 48
        assert math.log(VOCABULARY) / 2 < of_folder["eval/loss"] == found[0][0]["eval/loss"]


def test_command_on_a_model_with_another_activation(tmp_path: Path, commands: Commands) -> None:
    make_model("qwen2", tmp_path / "in", activation="silu")
    blend = write_data(tmp_path / "text", 40, seed=0)
    done = commands("evaluate", tmp_path / "in", f"data.valid={blend}", *SIZE, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "in (Qwen2ForCausalLM, silu), 12 samples of 16 tokens" in done.stdout
    assert "no L0: silu has no neurons that are exactly off" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    assert model.config.hidden_act == "silu"
    words = done.stdout.split()
    assert math.exp(float(words[words.index("eval/loss") + 1])) == pytest.approx(
        float(words[words.index("eval/ppl") + 1]), rel=1e-4
    )


def test_mistakes_are_named(tmp_path: Path) -> None:
    make_model("llama-tied", tmp_path / "in")
    blend = write_data(tmp_path / "text", 40, seed=0)
    Path(f"{blend}.json").write_text(json.dumps({"vocab_size": VOCABULARY + 1}))
    make_model("llama-tied", tmp_path / "incomplete")
    rewrite(tmp_path / "incomplete", lambda tensors: tensors.pop("model.norm.weight"))
    for folder, overrides, expected in (
        ("in", [], "give data.valid=PREFIX, written by `megasparse preprocess`"),
        ("in", ["data.valid=nowhere"], "no file nowhere.bin"),
        ("in", [f"data.valid={blend}"], "has tokens of a vocabulary of 61"),
        ("in", [f"data.valid={blend}", "parallel.tensor=2"], "whole in every process"),
        (
            "in",
            [f"data.valid={blend}", "model.rotary_base=5e5"],
            "model.rotary_base: a model in Hugging Face format is",
        ),
        ("in", [f"data.valid={blend}", "data.sequence_length=512"], "longer than model.max_position_embeddings = 256"),
        ("incomplete", [f"data.valid={blend}"], "a tensor is missing: model.norm.weight"),
    ):
        with pytest.raises((ConfigError, ConvertError)) as caught:
            evaluate_folder(tmp_path / folder, overrides)
        assert expected in str(caught.value)


def test_a_tokenizer_of_the_model_must_be_that_of_the_data(tmp_path: Path, commands: Commands) -> None:
    make_model("llama-tied", tmp_path / "in", dtype=torch.bfloat16)
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="w1")).save(str(tmp_path / "in/tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 59 + 1}" for i in range(4000)))
    others = {"<|endoftext|>": 0} | {f"w{i}": VOCABULARY - i for i in range(1, VOCABULARY)}
    Tokenizer(WordLevel(others, unk_token="w1")).save(str(tmp_path / "other.json"))
    for name, tokenizer in (("right", tmp_path / "in"), ("wrong", tmp_path / "other.json")):
        source = [str(tmp_path / "text.txt")]
        preprocess(PreprocessOptions(inputs=source, output=tmp_path / name, tokenizer=str(tokenizer), workers=1))
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = commands("evaluate", tmp_path / "in", f"data.valid={tmp_path / 'right'}", *SIZE, **cache)
    assert done.returncode == 0, done.stderr
    assert "eval/layer_3/l0" in done.stdout
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        evaluate_folder(tmp_path / "in", [f"data.valid={tmp_path / 'wrong'}"])
