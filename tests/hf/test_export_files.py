"""Around the export: files, tokenizer, resuming, and one clear sentence for everything that cannot be done."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from transformers import AutoModelForCausalLM, AutoTokenizer

from megasparse.data.tokenizer import load_tokenizer
from megasparse.hf.errors import ConvertError
from megasparse.hf.megatron_files import CheckpointReader
from megasparse.hf.to_hf import ToHf, convert_to_hf
from tests.hf.cases import config_of, contents, write_plain

NAME = "llama-untied-gqa-scaled"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_plain(tmp_path / "run/checkpoints/step_00000000", config_of(NAME))


def write_tokenizer(path: Path, words: int) -> Path:
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, words)}
    Tokenizer(WordLevel(vocabulary, unk_token="w1")).save(str(path))
    return path


def with_tokenizer(path: Path, tokenizer: Path) -> Path:
    raw = config_of(NAME)
    raw["data"]["tokenizer"] = str(tokenizer)
    return write_plain(path, raw)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith((".out", "out"))]


def test_a_run_s_folder_stands_for_its_newest_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    assert convert_to_hf(ToHf(tmp_path / "run", tmp_path / "out")).checkpoint == checkpoint


def test_shards_hold_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    one = convert_to_hf(ToHf(checkpoint, tmp_path / "one"))
    many = convert_to_hf(ToHf(checkpoint, tmp_path / "many", shard_bytes=10_000))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert (one.files, many.files) == (1, len(files))
    merged: dict[str, torch.Tensor] = {}
    for file in files:
        merged |= load_file(file)
    whole = load_file(tmp_path / "one/model.safetensors")
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("named", ["file", "folder"])
def test_tokenizer_and_token_ids_travel_along(named: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    source = write_tokenizer(tmp_path / "tokenizer/tokenizer.json", 60)
    trained = with_tokenizer(tmp_path / "checkpoint", source if named == "file" else source.parent)
    result = convert_to_hf(ToHf(trained, tmp_path / "out"))
    assert result.notes == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == Tokenizer.from_file(str(source)).get_vocab()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] <= 5


def test_a_folder_s_generation_config_and_chat_template_travel_along(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.json", 50)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "w2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    generation = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    result = convert_to_hf(ToHf(checkpoint, tmp_path / "out", tokenizer=str(folder)))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == ([0, 7], 2, None)
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == generation
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert result.notes == ["the tokenizer uses 50 of the model's 60 tokens"]


def test_the_file_that_is_named_is_the_tokenizer_whatever_lies_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.json", 40)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    convert_to_hf(ToHf(checkpoint, tmp_path / "out", tokenizer=str(write_tokenizer(folder / "second.json", 60))))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 60


def test_data_made_with_the_tokenizer_is_data_of_the_export(checkpoint: Path, tmp_path: Path) -> None:
    """Also where the tokenizer.json says that texts are to be cut and padded, which neither preprocessing nor the
    export takes from it."""
    source = write_tokenizer(tmp_path / "tokenizer.json", 60)
    backend = Tokenizer.from_file(str(source))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(source))
    convert_to_hf(ToHf(checkpoint, tmp_path / "out", tokenizer=str(source)))
    assert load_tokenizer(str(tmp_path / "out")).fingerprint == load_tokenizer(str(source)).fingerprint


def test_an_interrupted_export_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    options = ToHf(checkpoint, tmp_path / "out", shard_bytes=20_000)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_hf(options, interrupt)
    partial = tmp_path / ".out.partial"
    kept = {path.name: path.stat().st_ino for path in partial.glob("model-*.safetensors")}
    assert kept
    assert not (tmp_path / "out").exists()
    convert_to_hf(options)
    assert not partial.exists()
    assert kept.items() <= {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}.items()
    convert_to_hf(ToHf(checkpoint, tmp_path / "straight", shard_bytes=20_000))
    again, straight = contents(tmp_path / "out"), contents(tmp_path / "straight")
    assert {name: data for name, (data, _) in again.items()} == {name: data for name, (data, _) in straight.items()}


def test_other_options_start_anew(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_hf(ToHf(checkpoint, tmp_path / "out", shard_bytes=20_000), interrupt)
    convert_to_hf(ToHf(checkpoint, tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_an_existing_output_stays_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(ConvertError, match="exists already"):
        convert_to_hf(ToHf(checkpoint, tmp_path / "out"))
    assert (tmp_path / "out/mine").read_text() == "precious"
    with pytest.raises(ConvertError, match="out: holds mine, which is not of an earlier result"):
        convert_to_hf(ToHf(checkpoint, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out/mine").read_text() == "precious"
    (tmp_path / "out/mine").unlink()
    convert_to_hf(ToHf(checkpoint, tmp_path / "out", overwrite=True))
    assert leftovers(tmp_path) == ["out"]


def test_the_input_is_never_the_output(checkpoint: Path, tmp_path: Path) -> None:
    before = contents(tmp_path / "run")
    for output in (checkpoint, checkpoint.parent, tmp_path / "run"):
        with pytest.raises(ConvertError, match="the input or a folder around it"):
            convert_to_hf(ToHf(checkpoint, output, overwrite=True))
    assert contents(tmp_path / "run") == before


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(checkpoint)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # writing beyond fails as on a full disk
    try:
        with pytest.raises(ConvertError, match="writing failed"):
            convert_to_hf(ToHf(checkpoint, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConvertError, match="make room"):
        convert_to_hf(ToHf(checkpoint, tmp_path / "out"))
    assert leftovers(tmp_path) == []
    assert contents(checkpoint) == before


def _truncate(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-5000])


def _change_bytes(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def _truncate_unnoticed(path: Path) -> None:
    """As written by another tool: no manifest tells the size."""
    _truncate(path)
    _reseal(path)


def _change_common(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    common = torch.load(path / "common.pt", weights_only=False)
    change(common)
    torch.save(common, path / "common.pt")
    _reseal(path)


def _reseal(path: Path) -> None:
    from megasparse.training.checkpoint_files import seal

    (path / "manifest.json").unlink()
    seal(path, 0)


def test_plain_values_among_the_tensors(checkpoint: Path, tmp_path: Path) -> None:
    """As Megatron-Core 0.19 saves them."""
    reader = CheckpointReader(checkpoint)
    values = {"common_state/shard_0_1": [reader.common()], "a": torch.zeros(3)}
    writer = dcp.FileSystemWriter(tmp_path / "new")
    dcp.save(values, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    assert CheckpointReader(tmp_path / "new").common() == reader.common()


def _remove_common(path: Path) -> None:
    (path / "common.pt").unlink()
    _reseal(path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_truncate, r"__0_0\.distcp has \d+ bytes instead of \d+"),
        (_change_bytes, r"the content of __0_0\.distcp has changed since it was written .*; use another checkpoint"),
        (_truncate_unnoticed, r"__0_0\.distcp: truncated"),
        (lambda path: (path / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
        (lambda path: (path / "manifest.json").unlink(), "no complete checkpoint|not a complete checkpoint"),
        (lambda path: _change_common(path, lambda common: common.pop("run")), "not written by megasparse"),
        (
            lambda path: _change_common(path, lambda c: c["run"]["config"]["model"].update(ffn_hidden_size=52)),
            r"linear_fc1\.weight is \[4, 96, 32\], and its configuration says \[4, 104, 32\]",
        ),
        (
            lambda path: _change_common(path, lambda c: c["run"]["config"]["model"].update(qkv_bias=True)),
            r"has no tensor decoder\.layers\.self_attention\.linear_qkv\.bias",
        ),
        (
            lambda path: _change_common(path, lambda c: c["run"]["config"]["model"].update(new_key=1)),
            "configuration is not understood",
        ),
        (
            lambda path: _change_common(path, lambda c: c["run"]["config"]["model"].update(vocab_size=200)),
            "fewer than model.vocab_size 200",
        ),
        (_remove_common, r"common\.pt: cannot be read"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_named(
    damage: Callable[[Path], None], expected: str, checkpoint: Path, tmp_path: Path
) -> None:
    damage(checkpoint)
    with pytest.raises(ConvertError, match=expected) as caught:
        convert_to_hf(ToHf(checkpoint, tmp_path / "out"))
    assert str(checkpoint) in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_exported(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = write_plain(checkpoint.with_name("step_00000002"), config_of(NAME))
    _truncate(newest)
    assert convert_to_hf(ToHf(tmp_path / "run", tmp_path / "out")).checkpoint == checkpoint
    assert f"DAMAGED, trying the one before: {newest}: __0_0.distcp has" in caplog.text


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="not there"):
        convert_to_hf(ToHf(tmp_path / "nothing", tmp_path / "out"))
    with pytest.raises(ConvertError, match="no complete checkpoint there"):
        convert_to_hf(ToHf(tmp_path, tmp_path / "out"))


def test_a_tokenizer_that_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    large = write_tokenizer(tmp_path / "large.json", 61)
    with pytest.raises(ConvertError, match="has 61 tokens, the model 60"):
        convert_to_hf(ToHf(checkpoint, tmp_path / "out", tokenizer=str(large)))
    moved = write_tokenizer(tmp_path / "moved.json", 60)
    trained = with_tokenizer(tmp_path / "trained", moved)
    moved.unlink()
    with pytest.raises(ConvertError, match="--no-tokenizer"):
        convert_to_hf(ToHf(trained, tmp_path / "out"))
    assert leftovers(tmp_path) == []
    convert_to_hf(ToHf(trained, tmp_path / "out", no_tokenizer=True))


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    large = write_plain(tmp_path / "large", config_of(NAME), scale=1e5)
    with pytest.raises(ConvertError, match="float16's range"):
        convert_to_hf(ToHf(large, tmp_path / "out", dtype="fp16"))
    assert leftovers(tmp_path) == []
