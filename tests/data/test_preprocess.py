"""Preprocessing: exact round trips through Megatron's reader, interruptions, worker counts, what is overwritten."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megasparse.data import index_file
from megasparse.data.errors import DataError
from megasparse.data.preprocess import PreprocessOptions, PreprocessResult, preprocess
from megasparse.data.tokenizer import TextTokenizer
from tests.data.helpers import TEXTS, contents, read_back, write_jsonl


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


def test_an_output_is_named_without_the_ending(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"a prefix is without \.bin; give .*/corpus$"):
        preprocess(PreprocessOptions([str(source)], tmp_path / "corpus.bin", tokenizer=tokenizer.path))
    assert os.listdir(tmp_path) == ["in.jsonl"]
