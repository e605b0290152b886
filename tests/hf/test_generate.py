"""`megasparse generate` as a user types it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from megasparse.cli import main
from tests.hf.cases import config_of, megasparse, write_plain
from tests.hf.test_commands import write_tokenizer
from tests.hf.test_from_hf import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "model"
    make_model("llama-tied", path)
    write_tokenizer(path)
    return path


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    """Exit code, output and errors of the command, run in this process."""
    with pytest.raises(SystemExit) as end:
        main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_text_and_statistics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = megasparse("generate", folder, "--prompt", "w7", "--max-new-tokens", 6)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"w7( ?w\d+){1,6}\n", done.stdout)
    assert "The sparse MLP runs its dense path" in done.stderr
    numbers = re.search(r"prompt: 1 tokens in .* s; then \d tokens, .* a second; mean L0 ([\d.]+) of 48", done.stderr)
    assert numbers is not None, done.stderr
    assert 0 < float(numbers[1]) < 48
    code, out, err = here(capsys, folder, "--prompt", "w7", "--max-new-tokens", 6, "--dense")
    assert (code, out) == (0, done.stdout)
    assert "L0" not in err


def test_sampling_follows_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: int) -> str:
        return here(capsys, folder, "--prompt", "w3", "--temperature", 5, "--max-new-tokens", 12, "--seed", seed)[1]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_of_the_settings_that_a_model_brings_only_its_ends_count(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--temperature 0` takes the most likely token, whatever penalties and beams its authors recommend."""
    command = ("--prompt", "w7", "--max-new-tokens", 12)
    _, plain, _ = here(capsys, folder, *command)
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    settings = {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "num_beams": 2, "min_new_tokens": 40}
    (model / "generation_config.json").write_text(json.dumps(settings))
    code, out, err = here(capsys, model, *command)
    assert (code, out) == (0, plain), err
    first = plain.removeprefix("w7").split()[0]
    settings["eos_token_id"] = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(first)
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert "then 1 tokens" in here(capsys, model, *command)[2]


def test_the_end_that_a_tokenizer_puts_to_every_text_is_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model would begin another document."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    tokenizer.post_processor = TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", [(end, 0)])
    tokenizer.save(str(model / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(model)("w7")["input_ids"] == [7, 0]
    command = ("--prompt", "w7", "--max-new-tokens", 6)
    assert here(capsys, model, *command)[:2] == here(capsys, folder, *command)[:2]
    assert "prompt: 1 tokens" in here(capsys, model, *command)[2]
    assert "--prompt: has no tokens" in here(capsys, model, "--prompt", "")[2]


def test_mistakes_are_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_plain(tmp_path / "checkpoint", config_of("llama-tied"))
    make_model("llama-tied", tmp_path / "silu", activation="silu")
    write_tokenizer(tmp_path / "silu")
    make_model("llama-tied", tmp_path / "bare")
    for model, options, expected in (
        (run, (), f"megasparse convert to-hf {run} OUTPUT"),
        (tmp_path / "silu", (), "model.layers.0.mlp: its activation is SiLU"),
        (tmp_path / "bare", (), "model or tokenizer does not load"),
        (folder, ("--top-p", "0.5"), "--top-p: has no effect without sampling"),
        (folder, ("--max-new-tokens", "256"), "more than the model's 256 positions"),
        (folder, ("--max-new-tokens", "0"), "'0' is not a number of 1 or more"),
    ):
        code, out, err = here(capsys, model, "--prompt", "w3", *options)
        assert code == 2, err
        assert expected in err
        assert out == ""


def test_a_mistyped_folder_is_named_at_once(tmp_path: Path) -> None:
    """transformers takes it for a name on the hub, and asks for most of a minute where there is no network."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    for name in ("runs/exprted", "exprted", str(tmp_path / "exprted")):
        done = megasparse("generate", name, "--prompt", "w3", **nowhere)
        assert done.returncode == 2
        assert f"{name}: neither a model here nor one that could be downloaded" in done.stderr
        assert "Retrying" not in done.stderr
