"""Documents of every kind of file: formats, what is damaged, which files of a folder."""

from __future__ import annotations

import gzip
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megasparse.data.documents import find_files, read_documents
from megasparse.data.errors import DataError
from megasparse.data.preprocess import PreprocessOptions, preprocess
from megasparse.data.tokenizer import TextTokenizer
from tests.data.helpers import PACKERS, TEXTS, contents, read_back, write_jsonl


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
