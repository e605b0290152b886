"""Tokenizers: trained, loaded in every form, put where they belong; texts that imitate special tokens."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megasparse.data.errors import DataError
from megasparse.data.preprocess import PreprocessOptions, preprocess
from megasparse.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from tests.data.helpers import TEXTS, contents, read_back, write_jsonl
from tests.hf.cases import megasparse
from tests.hf.hub import Hub


@pytest.mark.parametrize(("files", "lines"), [(40, 1), (4, 10), (1, 40)])
def test_a_tokenizer_is_trained_on_as_much_as_asked_for(tmp_path: Path, files: int, lines: int) -> None:
    """A quarter of the text, whether a file holds one document or many."""
    for number in range(files):
        text = "".join(f"{chr(0x4E00 + number * lines + line)} " * 250 + "\n" for line in range(lines))
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    read: list[int] = []
    preprocess(
        PreprocessOptions([str(tmp_path)], tmp_path / "out" / "data", train_vocab_size=400, train_megabytes=0.01,
                          per_line=True),
        lambda phase, done, total, _: read.append(round(40 * done / total)) if phase == "tokenizer" else None,
    )  # fmt: skip
    assert read == [4 * count for count in range(1, 11)]


def test_tokenizer_loads_from_every_form(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    from transformers import AutoTokenizer

    folder = Path(tokenizer.path)
    for path in (folder, folder / "tokenizer.json"):
        again = load_tokenizer(str(path))
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.eod, again.vocab_size) == (tokenizer.eod, tokenizer.vocab_size)
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    hugging_face = AutoTokenizer.from_pretrained(str(folder))
    assert hugging_face.eos_token_id == tokenizer.eod
    assert hugging_face.encode(TEXTS[0], add_special_tokens=False) == tokenizer.encode_batch([TEXTS[0]])[0]
    # A GPT-2 folder of the old form: vocab.json and merges.txt alone.
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    old = tmp_path / "gpt2"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (old / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert load_tokenizer(str(old)).encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_documents_stay_whole_whatever_the_tokenizer_is_set_to(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """Tokenizers of sentence encoders say in their tokenizer.json that texts are to be cut and padded."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(f"{tokenizer.path}/tokenizer.json")
    backend.enable_truncation(16)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess(PreprocessOptions([str(source)], tmp_path / "d", tokenizer=str(tmp_path / "tokenizer.json")))
    assert [tokenizer.decode(document[:-1]) for document in read_back(tmp_path / "d")] == TEXTS


def test_no_kind_of_tokenizer_lets_a_document_forge_its_end(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """A Unigram model has special tokens among its pieces; another's end of a document need not be marked as one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        *((piece, -2.0) for piece in ("\u2581", "ab", "a", "b", "<", "/", "s", ">")),
    ]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens(["<unk>", "</s>", "<pad>"])
    unigram.add_tokens(["<br>"])
    unigram.save(str(tmp_path / "unigram.json"))
    plain = Tokenizer.from_file(f"{tokenizer.path}/tokenizer.json")
    plain.add_tokens([AddedToken("</s>", special=False)])
    plain.save(str(tmp_path / "plain.json"))
    for name in ("unigram", "plain"):
        made = load_tokenizer(str(tmp_path / f"{name}.json"), "</s>")
        texts = ["ab <br> a", "a</s>b <s> </s>", "a<pad>b"]
        encoded = made.encode_batch(texts)
        assert made.eod not in np.concatenate(encoded), name
        assert encoded[0] == Tokenizer.from_file(made.path).encode(texts[0], add_special_tokens=False).ids
        assert made.decode(encoded[1]) == texts[1]
        assert all("pad" not in made.decode([number]) for number in encoded[2])


def test_a_tokenizer_of_the_hub(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """By name it gives the tokens that its files give, and training finds it by what is written down."""
    model = tmp_path / "model"
    shutil.copytree(tokenizer.path, model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2"}))  # transformers makes it Qwen2's
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with Hub(model=model) as hub:
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache")}
        arguments = ("preprocess", source, "--output", tmp_path / "d", "--tokenizer")
        done = megasparse(*arguments, "some/model", "--workers", 2, **settings)
    assert done.returncode == 0, done.stderr
    assert [tokenizer.decode(document[:-1]) for document in read_back(tmp_path / "d")] == TEXTS
    described = json.loads((tmp_path / "d.json").read_text())
    assert described["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert load_tokenizer(described["tokenizer"]).fingerprint == tokenizer.fingerprint
    settings["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = megasparse(*arguments, "toknizer", "--overwrite", **settings)
    assert done.returncode == 2
    assert "toknizer: neither a tokenizer here nor one that could be downloaded" in done.stderr
    assert "Retrying" not in done.stderr


def test_tokenizer_mistakes(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="no token '<end>'"):
        load_tokenizer(tokenizer.path, "<end>")
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(iter(["a"]), 256, tmp_path / "small")
    source = write_jsonl(tmp_path / "in.jsonl", ["text"])
    (tmp_path / "data-tokenizer").mkdir()
    with pytest.raises(DataError, match=r"--tokenizer-output .*data-tokenizer: already there"):
        preprocess(PreprocessOptions([str(source)], tmp_path / "data", train_vocab_size=300))
    with pytest.raises(DataError, match="either --tokenizer"):
        preprocess(PreprocessOptions([str(source)], tmp_path / "data"))


@pytest.mark.parametrize("name", ["model.safetensors", "special_tokens_map.json", "thesis"])
def test_overwrite_spares_a_folder_with_more_than_a_trained_tokenizer(
    name: str, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    """With a model's weights its tokenizer stays too: with another one they would be worth nothing."""
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    model = tmp_path / "model"
    shutil.copytree(tokenizer.path, model)
    (model / name).write_text("precious")
    before = contents(tmp_path)
    options = PreprocessOptions(
        [str(source)], tmp_path / "out/d", train_vocab_size=300, tokenizer_output=model, overwrite=True
    )

    def read(*_: object) -> None:
        raise AssertionError("hours of work")

    with pytest.raises(DataError, match=rf"--tokenizer-output {model}: holds {name}, so it is not a tokenizer"):
        preprocess(options, read)
    with pytest.raises(DataError, match=rf"--tokenizer-output {source}: a file, not a folder"):
        preprocess(replace(options, tokenizer_output=source), read)
    assert contents(tmp_path) == before


def test_overwrite_replaces_a_trained_tokenizer(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = PreprocessOptions([str(source)], tmp_path / "d", train_vocab_size=300)
    preprocess(options)
    nobody = 2**22 + 1
    (tmp_path / f"d-tokenizer/.d-tokenizer.tokenizer.partial-{socket.gethostname()}-{nobody}").mkdir()  # of a kill
    result = preprocess(replace(options, train_vocab_size=310, overwrite=True))
    assert load_tokenizer(result.tokenizer).vocab_size == result.vocab_size == 310
    assert sorted(os.listdir(tmp_path / "d-tokenizer")) == ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path)) == ["d-tokenizer", "d.bin", "d.idx", "d.json", "in.jsonl"]


@pytest.mark.parametrize("there", ["nothing", "folder", "link"])
def test_a_tokenizer_on_another_disk(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`here` and `there` stand for disks: no rename leads from one to the other."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    source, asked = write_jsonl(tmp_path / "here/in.jsonl", TEXTS), tmp_path / "there/parent/words"
    if there == "folder":
        asked.mkdir(parents=True)
    elif there == "link":
        asked = tmp_path / "here/words"
        asked.symlink_to(tmp_path / "there/words")
    rename = os.replace

    def within_a_disk(old: Path, new: Path) -> None:
        if os.path.relpath(old, tmp_path).split("/")[0] != os.path.relpath(new, tmp_path).split("/")[0]:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(old, new)

    monkeypatch.setattr(os, "replace", within_a_disk)
    options = PreprocessOptions(
        [str(source)], tmp_path / "here/d", train_vocab_size=300, tokenizer_output=asked, overwrite=True, workers=2
    )
    for size in (300, 310):
        result = preprocess(replace(options, train_vocab_size=size))
        assert result.tokenizer == str(asked)
        assert load_tokenizer(str(asked)).vocab_size == size
    assert asked.is_symlink() == (there == "link")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith(".")) == []


def test_a_tokenizer_in_the_folder_of_the_data(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    folder = tmp_path / "out"
    preprocess(PreprocessOptions([str(source)], folder / "d", train_vocab_size=300, tokenizer_output=folder))
    assert sorted(os.listdir(folder)) == ["d.bin", "d.idx", "d.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_tokenizer_s_place_is_tried_before_the_work(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    asked = source / "words"  # below a file

    def read(*_: object) -> None:
        raise AssertionError("hours of work")

    options = PreprocessOptions([str(source)], tmp_path / "out/d", train_vocab_size=300, tokenizer_output=asked)
    with pytest.raises(DataError, match=rf"--tokenizer-output {asked}: cannot write there"):
        preprocess(options, read)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_too_full_for_the_tokenizer_keeps_the_old_one(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = PreprocessOptions([str(source)], tmp_path / "d", train_vocab_size=300)
    preprocess(options)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"--tokenizer-output .*d-tokenizer: writing failed \(File too large\)"):
            preprocess(replace(options, train_vocab_size=310, overwrite=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


def test_a_failure_after_training_keeps_the_old_tokenizer(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = PreprocessOptions([str(source)], tmp_path / "d", train_vocab_size=300)
    preprocess(options)
    source.write_text(source.read_text() + "broken\n")
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"in\.jsonl:7"):
        preprocess(replace(options, train_vocab_size=310, train_megabytes=1e-5, overwrite=True))
    assert contents(tmp_path) == before
