"""The commands as a user types them: import, train on, export, verify."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import Commands
from tests.hf.cases import VOCABULARY, config_of, contents, write_plain
from tests.hf.hub import Hub
from tests.hf.test_from_hf import make_model, weights_of
from tests.training.cases import write_data


def write_tokenizer(folder: Path) -> None:
    """A tokenizer, generation config and chat template beside a model."""
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(WordLevel(vocabulary, unk_token="w1")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9], "top_p": 0.5}))


def test_import_train_export(tmp_path: Path, commands: Commands) -> None:
    source = tmp_path / "in"
    built = make_model("qwen3", source)
    write_tokenizer(source)
    before = contents(source)

    done = commands("convert", "from-hf", source, tmp_path / "imported", "--verify", "--verify-tokens", 24)
    assert done.returncode == 0, done.stderr
    assert "verified: both compute the same" in done.stdout
    assert f"base: {tmp_path}/imported/model.yaml" in done.stdout
    assert contents(source) == before

    config = tmp_path / "continue.yaml"
    config.write_text(
        f"base: {tmp_path}/imported/model.yaml\n"
        f"run: {{directory: {tmp_path}/run}}\n"
        f"data: {{blend: {write_data(tmp_path / 'text', 60, seed=0)}, sequence_length: 16, num_workers: 0}}\n"
        "training: {global_batch_size: 2, steps: 2, eval_steps: 0}\n"
        "optimizer: {lr: 1e-3, weight_decay: 0.0}\n"
        "logging: {report: false}\n"
    )
    done = commands("pretrain", config, "checkpoint.load_scope=full")
    assert done.returncode != 0
    assert f"set checkpoint.load: {tmp_path}/imported and checkpoint.load_scope: weights" in done.stderr
    assert "Traceback" not in done.stderr

    done = commands("pretrain", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed since" not in done.stderr
    done = commands(
        "pretrain", config, "model.rotary_base=50000", f"run.directory={tmp_path}/other", "training.steps=1"
    )
    assert "checkpoint: changed since imported: model.rotary_base: 10000.0 -> 50000.0" in done.stderr

    done = commands("convert", "to-hf", tmp_path / "run", tmp_path / "out", "--verify", "--verify-tokens", 24)
    assert done.returncode == 0, done.stderr
    assert "verified: both compute the same" in done.stdout
    assert "note:" not in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = built.state_dict()
    moved = max(float((tensor - state[name]).abs().max()) for name, tensor in model.state_dict().items())
    assert 1e-4 < moved < 3e-3, "a step of AdamW moves a weight by about the learning rate"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [0, 9]
    assert model.generation_config.top_p == 0.5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 0
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_mistakes_are_one_sentence(tmp_path: Path, commands: Commands) -> None:
    for arguments, expected in (
        (("to-hf", tmp_path / "none", tmp_path / "out"), "none: not there; give a checkpoint"),
        (("from-hf", __file__, tmp_path / "out"), "config.json: not there; give the folder of a Hugging Face model"),
        (("from-hf", tmp_path, tmp_path / "out"), "config.json: not there; give the folder of a Hugging Face model"),
        (("to-hf", tmp_path, tmp_path / "out", "--shard-size", "large"), "'large' is not a size"),
        (("to-hf", tmp_path, tmp_path / "out", "--private"), "--private: is of --push alone"),
    ):
        done = commands("convert", *arguments)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path, commands: Commands) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "none", "HF_HOME": str(tmp_path / "cache")}
    done = commands("convert", "from-hf", "some/model", tmp_path / "out", **nowhere)
    assert done.returncode == 2
    assert "some/model: neither a model here nor one that could be downloaded" in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept").mkdir()
    done = commands("convert", "from-hf", "some/model", tmp_path / "kept", **nowhere)
    assert f"{tmp_path}/kept: exists already" in done.stderr


def test_a_model_of_the_hub(tmp_path: Path, commands: Commands) -> None:
    """Pickled weights where there are no others, and never those in their authors' own format."""
    make_model("llama-tied", tmp_path / "model")
    torch.save(weights_of(tmp_path / "model"), tmp_path / "model/pytorch_model.bin")
    for file in (tmp_path / "model").glob("model*"):
        file.unlink()
    (tmp_path / "model/consolidated.safetensors").write_text("the same once more")
    for model in (None, tmp_path / "model"):
        with Hub(model=model) as hub:
            settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "cache")}
            done = commands("convert", "from-hf", "some/model", tmp_path / "out", **settings)
        if model is None:
            assert done.returncode == 2
            assert "Access to some/model is restricted" in done.stderr
            assert "for a private or gated model run `hf auth login`" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert sorted(hub.fetched) == ["config.json", "generation_config.json", "pytorch_model.bin"]
    assert (tmp_path / "out/manifest.json").exists()


def test_push_uploads_the_folder(tmp_path: Path, commands: Commands) -> None:
    checkpoint = write_plain(tmp_path / "checkpoint", config_of("llama-tied"))
    with Hub() as hub:
        settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "cache")}
        arguments = ("convert", "to-hf", checkpoint, tmp_path / "out", "--no-tokenizer", "--push", "some/model")
        done = commands(*arguments, "--private", **settings)
        assert done.returncode == 0, done.stderr
        assert f"{hub.address}/some/model/commit/abc" in done.stdout
        assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert hub.created == [{"name": "model", "organization": "some", "visibility": "private"}]
    with Hub(refuse_commit=True) as hub:
        settings["HF_ENDPOINT"] = hub.address
        done = commands(*arguments, "--overwrite", **settings)
    assert done.returncode == 2
    assert "out is complete, but the upload to some/model failed (403 Forbidden" in done.stderr
    assert f"hf upload some/model {tmp_path}/out" in done.stderr
    assert (tmp_path / "out/config.json").exists()


def test_push_asks_the_hub_for_a_tokenizer_once(tmp_path: Path, commands: Commands) -> None:
    """It is read to check it, to choose between Qwen2 and Llama, and to write it."""
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    raw = config_of("qwen2")
    raw["data"]["tokenizer"] = "some/model"
    checkpoint = write_plain(tmp_path / "checkpoint", raw)
    with Hub(model=tmp_path / "tokenizer") as hub:
        settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "cache")}
        done = commands("convert", "to-hf", checkpoint, tmp_path / "out", "--push", "me/model", **settings)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM with biases" in done.stdout
    assert hub.lookups == 1
    assert json.loads(hub.files["tokenizer.json"]) == json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())


def test_push_fails_before_the_export(tmp_path: Path, commands: Commands) -> None:
    raw = config_of("llama-tied")
    checkpoint = write_plain(tmp_path / "checkpoint", raw)
    without_tokenizer = write_plain(tmp_path / "moved", {**raw, "data": {**raw["data"], "tokenizer": "moved/away"}})
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    raw = config_of("qwen2")  # with another tokenizer; and Llama, which takes its place then, wants other sizes
    raw["data"]["tokenizer"] = str(tmp_path / "tokenizer")
    raw["model"].update(hidden_size=34, kv_channels=8)
    nowhere = write_plain(tmp_path / "odd", raw)
    (tmp_path / "kept").mkdir()
    with Hub() as hub:
        right, out = {"HF_TOKEN": hub.token}, tmp_path / "out"
        cases: list[tuple[Path, Path, str, dict[str, str], str]] = [
            (checkpoint, out, "some/model", {}, "no token for the hub; run `hf auth login`, or set HF_TOKEN"),
            (checkpoint, out, "some/model", {"HF_TOKEN": "hf_wrong"}, "401 Unauthorized"),
            (checkpoint, out, "so me/model", right, "write it as user/model"),
            (tmp_path / "none", out, "some/model", right, "none: not there; give a checkpoint"),
            (
                without_tokenizer,
                out,
                "some/model",
                right,
                "tokenizer moved/away: neither a tokenizer here nor one that could be downloaded",
            ),
            (nowhere, out, "some/model", right, "LlamaForCausalLM needs hidden_size (34) to be a multiple"),
            (checkpoint, tmp_path / "kept", "some/model", right, "kept: exists already"),
        ]

        place = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache")}
        pushes = [
            (("convert", "to-hf", source, output, "--push", name), {**place, **token})
            for source, output, name, token, _ in cases
        ]
        for (*_, expected), done in zip(cases, commands.side_by_side(pushes), strict=True):
            assert done.returncode == 2
            assert expected in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        assert not out.exists()
        assert hub.created == []
