"""Preprocessing: exact round trips through Megatron's reader, damaged inputs, interruptions, worker counts."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megasparse.data import index_file
from megasparse.data.documents import find_files, read_documents
from megasparse.data.errors import DataError
from megasparse.data.preprocess import PreprocessOptions, PreprocessResult, preprocess
from megasparse.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from tests.hf.cases import megasparse
from tests.hf.hub import Hub

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  leading space, trailing tab\t",
    "Ünïcödé, 中文, 🙂, a combining e\u0301, a null \x00, a carriage return \r\n",
    "a document that forges its end: <|endoftext|> and goes on",
    "x",
    "the quick brown fox " * 50,
]


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": partial(pa.compress, codec="zstd", asbytes=True),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(iter(TEXTS * 4), 400, tmp_path_factory.mktemp("tokenizer"))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def read_back(prefix: Path) -> list[np.ndarray]:
    """Documents as Megatron reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1)), "one sequence a document"
    return [np.array(dataset[i]) for i in range(len(dataset))]  # copies: the file is unmapped with the dataset


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip_is_byte_exact(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*TEXTS, ""])
    prefix = tmp_path / "out" / "data"
    result = preprocess(PreprocessOptions([str(source)], prefix, tokenizer=tokenizer.path))
    documents = read_back(prefix)
    assert all(document[-1] == tokenizer.eod for document in documents)
    assert [tokenizer.decode(document[:-1]) for document in documents] == TEXTS
    assert tokenizer.eod not in np.concatenate([document[:-1] for document in documents]), "a text forged an end"
    assert (result.documents, result.empty) == (len(TEXTS), 1)
    assert result.tokens == sum(len(document) for document in documents)
    described = json.loads(Path(f"{prefix}.json").read_text())
    assert described["tokens"] == result.tokens
    assert described["documents"] == len(TEXTS)
    assert described["vocab_size"] == tokenizer.vocab_size
    assert described["dtype"] == "uint16"
    assert sorted(os.listdir(prefix.parent)) == ["data.bin", "data.idx", "data.json"]


@pytest.mark.parametrize("vocab_size", [400, 70000])
def test_files_are_those_of_megatron(vocab_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    monkeypatch.setattr(index_file, "_PART", 4)
    rng = np.random.default_rng(0)
    writer = index_file.DatasetWriter(tmp_path / "ours", vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for count in (3, 5, 3):
        lengths = rng.integers(1, 2000, count).tolist()
        tokens = rng.integers(0, vocab_size, sum(lengths)).astype(np.int32)
        writer.add(tokens, lengths)
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            builder.add_document(document, [len(document)])
    writer.finish()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        assert (tmp_path / f"ours.{end}").read_bytes() == (tmp_path / f"theirs.{end}").read_bytes()
    assert index_file.damage(str(tmp_path / "ours")) is None


def test_memory_for_billions_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of 10 TB has some of them; at 140 bytes each, as Megatron's builder takes, no machine would do."""
    monkeypatch.setattr(index_file, "_PART", 1000)
    writer = index_file.DatasetWriter(tmp_path / "data", 400)
    tokens, lengths = np.zeros(1000, np.int32), [1] * 1000
    documents = 1_000_000
    tracemalloc.start()
    try:
        for _ in range(documents // 1000):
            writer.add(tokens, lengths)
        writer.finish()
        assert tracemalloc.get_traced_memory()[1] / documents < 10  # four, and as many while the array grows
    finally:
        tracemalloc.stop()


def test_a_full_disk_is_one_sentence(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS * 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"out/d: writing failed \(File too large\); make room"):
            preprocess(PreprocessOptions([str(source)], tmp_path / "out" / "d", tokenizer=tokenizer.path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_end_of_document(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess(PreprocessOptions([str(source)], tmp_path / "d", tokenizer=tokenizer.path, append_eod=False))
    assert [tokenizer.decode(document) for document in read_back(tmp_path / "d")] == TEXTS


def test_every_format_gives_the_same_tokens(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    texts = [text for text in TEXTS if "\r" not in text]
    inputs = {"jsonl": [write_jsonl(tmp_path / "a.jsonl", texts)]}
    for suffix, pack in PACKERS.items():
        packed = tmp_path / f"b.jsonl.{suffix}"
        whole = inputs["jsonl"][0].read_bytes()
        packed.write_bytes(pack(whole[:99]) + pack(whole[99:]))  # as parallel packers write them, and cat joins them
        inputs[suffix] = [packed]
    table = pa.table({"text": pa.array(texts), "n": pa.array(range(len(texts)))})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    inputs["parquet"] = [tmp_path / "c.parquet"]
    folder = tmp_path / "files"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode())
    (folder / "not-text.png").write_bytes(b"\xff\xfe")
    inputs["txt"] = [folder]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for text, (i, (suffix, pack)) in zip(texts, enumerate([("", bytes), *PACKERS.items()]), strict=True):
        (mixed / f"{i}.txt{suffix and '.'}{suffix}").write_bytes(pack(text.encode()))
    inputs["packed txt"] = [mixed]
    written = {}
    for name, files in inputs.items():
        preprocess(PreprocessOptions([str(f) for f in files], tmp_path / f"out-{name}", tokenizer=tokenizer.path))
        written[name] = [(tmp_path / f"out-{name}{end}").read_bytes() for end in (".bin", ".idx")]
    assert all(pair == written["jsonl"] for pair in written.values())


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_strings_of_every_arrow_type(kind: pa.DataType, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """Parquet files name it beside their own schema, and reading follows."""
    texts = pa.array([*TEXTS, b"damaged \xff"], pa.binary()).view(pa.string())
    table = pa.table({"text": texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)})
    pq.write_table(table, tmp_path / "in.parquet")
    assert pq.read_schema(tmp_path / "in.parquet").field("text").type == kind
    options = PreprocessOptions([str(tmp_path / "in.parquet")], tmp_path / "d", tokenizer=tokenizer.path)
    result = preprocess(replace(options, skip_damaged=True))
    assert [tokenizer.decode(document[:-1]) for document in read_back(tmp_path / "d")] == TEXTS
    assert [damage.split(":")[0] for damage in result.damaged] == [f"{tmp_path}/in.parquet, row 7"]


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    texts = [f"document {i}: " + "lorem ipsum dolor sit amet " * (i % 13) for i in range(3500)]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    outputs = []
    for workers in (1, 2):
        folder = tmp_path / f"workers-{workers}"
        calls: list[int] = []

        def progress(phase: str, read: int, total: int, _: PreprocessResult, calls: list[int] = calls) -> None:
            if phase == "tokens":
                assert total == source.stat().st_size
                calls.append(read)

        options = PreprocessOptions([str(source)], folder / "data", train_vocab_size=300, workers=workers)
        result = preprocess(options, progress)
        assert result.documents == len(texts)
        assert len(calls) > 2
        assert calls == sorted(calls)
        assert calls[-1] == source.stat().st_size
        outputs.append(contents(folder))
    different = [name for name in outputs[0] if outputs[0][name] != outputs[1][name]]
    assert different == ["data.json"], "only the path of the tokenizer differs"
    assert outputs[0].keys() == outputs[1].keys()


@pytest.mark.parametrize(
    ("line", "message", "workers"),
    [
        (b'{"text": "cut off', "not valid JSON", 1),
        (b'{"body": "no text"}', "the key 'text' is missing (keys: body)", 1),
        (b'{"text": 7}', "the key 'text' is a int, not a string", 1),
        (b'["text"]', "a JSON list, not an object", 2),
        (b'{"text": "\xff"}', "not valid JSON", 1),
    ],
)
def test_damaged_line_is_named(
    tmp_path: Path, tokenizer: TextTokenizer, line: bytes, message: str, workers: int
) -> None:
    good = json.dumps({"text": "fine"}).encode()
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([good, b"", good, line, good]) + b"\n")
    before = contents(tmp_path)
    options = PreprocessOptions([str(source)], tmp_path / "data", tokenizer=tokenizer.path, workers=workers)
    with pytest.raises(DataError) as caught:
        preprocess(options)
    assert f"{source}:4: " in str(caught.value)
    assert message in str(caught.value)
    assert "--skip-damaged" in str(caught.value)
    assert contents(tmp_path) == before
    skipping = PreprocessOptions([str(source)], tmp_path / "data", tokenizer=tokenizer.path, skip_damaged=True)
    result = preprocess(skipping)
    assert result.documents == 3
    assert len(result.damaged) == 1
    assert f"{source}:4" in result.damaged[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_that_are_no_text_are_passed_over(tmp_path: Path, tokenizer: TextTokenizer, workers: int) -> None:
    """As crawled text has them: half of a character in JSON or Parquet or a text file, JSON of absurd depth."""
    (tmp_path / "a.jsonl").write_text('{"text": "one \\ud83d"}\n{"text": "two", "x": ' + "[" * 100_000 + "\n")
    (tmp_path / "b.txt").write_bytes(b"three \xff\nfour\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("fünf".encode("latin-1")))
    text = pa.array([b"six \xff", b"seven"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "d.parquet")
    options = PreprocessOptions(
        [str(tmp_path)], tmp_path / "out" / "data", tokenizer=tokenizer.path, per_line=True, workers=workers
    )
    with pytest.raises(DataError, match=r"a\.jsonl:1: no text \(character 4: surrogates not allowed"):
        preprocess(options)
    result = preprocess(replace(options, skip_damaged=True))
    assert [text.split(": ")[0].removeprefix(f"{tmp_path}/") for text in result.damaged] == [
        "a.jsonl:1", "a.jsonl:2", "b.txt:1", "c.txt.gz:1", "d.parquet, row 1"
    ]  # fmt: skip
    assert [tokenizer.decode(document[:-1]) for document in read_back(tmp_path / "out" / "data")] == ["four", "seven"]


def test_damaged_parquet_and_text(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    def run(name: str) -> str:
        with pytest.raises(DataError) as caught:
            preprocess(PreprocessOptions([str(tmp_path / name)], tmp_path / "data", tokenizer=tokenizer.path))
        assert not list(tmp_path.glob("data*"))
        return str(caught.value)

    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "column.parquet")
    assert "no column 'text' (columns: body)" in run("column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    assert "holds int64, not strings" in run("numbers.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert "null.parquet, row 2: 'text' is null" in run("null.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "null.parquet").read_bytes()[:-20])
    assert "cut.parquet: not a Parquet file" in run("cut.parquet")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    assert "latin.txt: not UTF-8 (byte 2" in run("latin.txt")
    for suffix, pack in PACKERS.items():
        (tmp_path / f"cut.jsonl.{suffix}").write_bytes(pack(b'{"text": "abc"}\n' * 100)[:-12])
        assert f"cut.jsonl.{suffix}: cannot be read" in run(f"cut.jsonl.{suffix}")
        (tmp_path / f"not.txt.{suffix}").write_text("not packed at all")
        assert f"not.txt.{suffix}: cannot be read" in run(f"not.txt.{suffix}")
    packed = bytearray(gzip.compress(b"abc" * 100))
    packed[10] |= 6  # a kind of block that does not exist
    (tmp_path / "block.txt.gz").write_bytes(packed)
    assert "block.txt.gz: cannot be read" in run("block.txt.gz")
    assert "absent.txt: no such file or folder" in run("absent.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "no text in" in run("empty.txt")


@pytest.mark.parametrize("name", ["a b[1].jsonl.gz", "a b[1].jsonl.zst", "head.parquet", "index.parquet"])
def test_a_damaged_file_can_be_left_out(name: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """As the message says to, after --skip-damaged, which is of documents, did not help."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "good.jsonl", TEXTS)
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [f"{i % 5}" for i in range(1000)]}), folder / name, compression="none")
        data = bytearray((folder / name).read_bytes())
        index = data.index(b"\x88FD")  # the bits of the first rows' places in the dictionary
        data[index : index + 3] = b"\xff\xff\xff"
        (folder / name).write_bytes(data[:-20] if name == "head.parquet" else data)
    else:
        (folder / name).write_bytes(PACKERS[name.split(".")[-1]](b'{"text": "abc"}\n' * 100)[:-12])
    options = PreprocessOptions([str(folder)], tmp_path / "d", tokenizer=tokenizer.path, skip_damaged=True)
    with pytest.raises(DataError) as caught:
        preprocess(options)
    assert f"{folder / name}: " in str(caught.value)
    option, *pattern = shlex.split(str(caught.value).split("in a folder with ")[1])
    assert option == "--exclude"
    preprocess(replace(options, exclude=pattern))
    assert len(read_back(tmp_path / "d")) == len(TEXTS)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.jsonl.lz4", "a.tgz", "A.TAR.GZ", "a.txt.Z"])
def test_what_is_not_unpacked_is_refused(name: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """A tar archive of texts is valid UTF-8: it would be learned with its headers."""
    source = tmp_path / name
    source.write_bytes(gzip.compress(b"text") if name.lower().endswith("gz") else b"text")
    with pytest.raises(DataError, match=rf"{name}: not read as it is packed; unpack it.*\.zst"):
        preprocess(PreprocessOptions([str(source)], tmp_path / "data", tokenizer=tokenizer.path))


def test_a_window_too_large_is_explained(tmp_path: Path) -> None:
    """`zstd --long=31`, as some published corpora are packed."""
    header = b"\x28\xb5\x2f\xfd" + b"\x00" + b"\xa8"  # no content size, a window of 2^31 bytes
    (tmp_path / "a.jsonl.zst").write_bytes(header + b"\x01\x00\x00")
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: cannot be read .*zstd -d --long=31"):
        list(read_documents(tmp_path / "a.jsonl.zst"))


def test_existing_output_is_kept(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["first"])
    options = PreprocessOptions([str(source)], tmp_path / "data", tokenizer=tokenizer.path)
    preprocess(options)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="already there"):
        preprocess(options)
    assert contents(tmp_path) == before
    write_jsonl(source, ["second", "third"])
    preprocess(PreprocessOptions([str(source)], tmp_path / "data", tokenizer=tokenizer.path, overwrite=True))
    texts = [tokenizer.decode(document[:-1]) for document in read_back(tmp_path / "data")]
    assert texts == ["second", "third"]


def test_an_input_is_not_overwritten(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """OUTPUT.json, the counts, has the name that a corpus may have."""
    source = write_jsonl(tmp_path / "corpus.json", TEXTS)
    before = contents(tmp_path)
    options = PreprocessOptions([str(source)], tmp_path / "corpus", tokenizer=tokenizer.path, overwrite=True)
    for inputs in ([str(source)], [str(tmp_path)]):
        with pytest.raises(DataError, match=r"corpus\.json: is an input, and the output would replace it"):
            preprocess(replace(options, inputs=inputs, include=["*.json"]))
    assert contents(tmp_path) == before


def test_failed_overwrite_keeps_the_old_data(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["first"])
    preprocess(PreprocessOptions([str(source)], tmp_path / "data", tokenizer=tokenizer.path))
    source.write_text('{"text": "second"}\nbroken\n')
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"in\.jsonl:2"):
        preprocess(PreprocessOptions([str(source)], tmp_path / "data", tokenizer=tokenizer.path, overwrite=True))
    assert contents(tmp_path) == before


def test_leftovers_of_this_host_alone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: TextTokenizer
) -> None:
    """Whether a process of another host is alive cannot be seen from here."""
    monkeypatch.setattr("socket.gethostname", lambda: "login")
    nobody = 2**22 + 1  # above the largest process id
    for host in ("login", "login-2"):
        (tmp_path / f".data.partial-{host}-{nobody}").mkdir()
    source = write_jsonl(tmp_path / "in.jsonl", ["first"])
    preprocess(PreprocessOptions([str(source)], tmp_path / "data", tokenizer=tokenizer.path))
    assert [path.name for path in tmp_path.glob(".data.*")] == [f".data.partial-login-2-{nobody}"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interruption_leaves_nothing_half_written(tmp_path: Path, tokenizer: TextTokenizer, how: int) -> None:
    # 40 MB, seconds of work: the signal comes in the middle.
    source = write_jsonl(tmp_path / "in.jsonl", ["some words " * 10_000] * 400)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "megasparse", "preprocess", str(source), "--output", str(output / "data"),
               "--tokenizer", tokenizer.path, "--workers", "1"]  # fmt: skip
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in output.glob(".data.partial-*/data.bin")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(timeout=30)
    process.stderr.close()
    assert process.returncode != 0
    assert list(output.glob("data*")) == []
    if how == signal.SIGKILL:
        write_jsonl(source, ["after the kill"])
        preprocess(PreprocessOptions([str(source)], output / "data", tokenizer=tokenizer.path))
        assert sorted(os.listdir(output)) == ["data.bin", "data.idx", "data.json"], "remains were cleared away"
    else:
        assert list(output.iterdir()) == []


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


def test_folders_are_filtered_and_ordered(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "sub/c.py", "sub/test/d.py", "e.txt", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    folder = [str(tmp_path)]

    def names(**options: object) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files(folder, **options)]  # type: ignore[arg-type]

    assert names() == ["e.txt"]
    assert names(include=["*.py"]) == ["a.py", "b.py", "sub/c.py", "sub/test/d.py"]
    assert names(include=["*.py"], exclude=["test", "b.*"]) == ["a.py", "sub/c.py"]
    shuffled = names(include=["*.py"], shuffle_seed=1)
    assert shuffled == names(include=["*.py"], shuffle_seed=1) != names(include=["*.py"])
    assert sorted(shuffled) == names(include=["*.py"])
    with pytest.raises(DataError, match=r"matches \*\.rs"):
        names(include=["*.rs"])


def test_text_by_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("one\n\ntwo\r\nthree")
    records = list(read_documents(path, per_line=True))
    assert [record.text("text") for record in records] == ["one", "two", "three"]
    assert [record.where for record in records] == [f"{path}:1", f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize("name", ["A.JSONL", "A.JSONL.GZ", "a.Json.gz", "A.PARQUET"])
def test_a_file_is_known_by_its_name_in_capitals_too(name: str, tmp_path: Path) -> None:
    """As text, JSON lines would be learned with their braces and keys, without a word."""
    content = b'{"text": "one"}\n{"text": "two"}\n'
    if name == "A.PARQUET":
        pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert [record.text("text") for record in read_documents(tmp_path / name)] == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    """Editors of Windows put one at the beginning of a file of UTF-8."""
    text = '{"text": "one"}\n' if name == "a.jsonl" else "one"
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for per_line in (False, True):
        records = read_documents(tmp_path / name, per_line=per_line)
        assert [record.text("text") for record in records] == ["one"]


def test_an_output_is_named_without_the_ending(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"a prefix is without \.bin; give .*/corpus$"):
        preprocess(PreprocessOptions([str(source)], tmp_path / "corpus.bin", tokenizer=tokenizer.path))
    assert os.listdir(tmp_path) == ["in.jsonl"]
