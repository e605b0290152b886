"""Finding input files and reading documents from them: text, JSON lines, Parquet."""

from __future__ import annotations

import json
import random
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from shlex import quote

from megasparse.data.errors import DataError
from megasparse.data.packed import NOT_READ, PACKED, UNPACKING_ERRORS, explain, inner_suffix, unpacked

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
DEFAULT_INCLUDE = (
    "*.parquet",
    *(f"*{kind}{packed}" for kind in (".txt", ".jsonl", ".ndjson") for packed in ("", *PACKED)),
)


@dataclass(frozen=True)
class Record:
    """One document as read: not yet decoded, so that this happens in the workers, and one that is damaged can be told
    from a damaged file.

    `raw`: UTF-8 of the text, or of a JSON object that holds it (`is_json`). `where`: file and line or row, for
    messages. `read_bytes`: how much of its file this record accounts for.
    """

    raw: bytes | None
    where: str
    read_bytes: int
    is_json: bool = False

    def text(self, key: str) -> str:
        """The document. Raises DataError where it is no UTF-8, no JSON object, or lacks the key."""
        if self.raw is None:
            raise DataError(f"{self.where}: {key!r} is null")
        return self._value(self.raw, key) if self.is_json else _decode(self.raw, self.where)

    def _value(self, raw: bytes, key: str) -> str:
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
            raise DataError(f"{self.where}: not valid JSON ({error})") from None
        if not isinstance(data, dict):
            raise DataError(f"{self.where}: a JSON {type(data).__name__}, not an object with the key {key!r}")
        text = data.get(key)
        if not isinstance(text, str):
            what = f"is a {type(text).__name__}, not a string" if key in data else "is missing"
            raise DataError(f"{self.where}: the key {key!r} {what} (keys: {', '.join(data)}); choose with --text-key")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write \ud83d alone, which is half of a character
            raise DataError(f"{self.where}: no text (character {error.start}: {error.reason})") from None
        return text


def find_files(
    inputs: Sequence[str],
    include: Sequence[str] = DEFAULT_INCLUDE,
    exclude: Sequence[str] = (),
    shuffle_seed: int | None = None,
) -> list[Path]:
    """Files in the order given, folders expanded in sorted order.

    `include`: glob patterns of file names, for folders. `exclude`: patterns of a file's or a folder's name,
    or of the path below the folder. `shuffle_seed`: shuffle the files. Raises DataError for what is not
    there, for what cannot be unpacked, or for nothing found.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _wanted(p.relative_to(path), include, exclude))
            if not found:
                raise DataError(f"{path}: no file in this folder matches {' '.join(include)}; choose with --include")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    for path in files:
        if inner_suffix(path) in NOT_READ:
            raise DataError(f"{path}: not read as it is packed; unpack it, or pack its files as {', '.join(PACKED)}")
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(files)
    return files


def _wanted(path: Path, include: Sequence[str], exclude: Sequence[str]) -> bool:
    names = (*path.parts, path.as_posix())
    return any(fnmatch(path.name, p) for p in include) and not any(fnmatch(n, p) for p in exclude for n in names)


def read_documents(file: Path, text_key: str = "text", per_line: bool = False) -> Iterator[Record]:
    """Documents of one file, by its suffix.

    `.jsonl`: one JSON object a line. `.parquet`: one row. Else plain text: the whole file, or each line where
    `per_line`, without the byte order mark that some editors put at the beginning. Packed files (`packed.PACKED`) are
    unpacked. Raises DataError, naming file and line, for what cannot be read.
    """
    kind = inner_suffix(file)
    try:
        if kind == ".parquet":
            yield from _read_parquet(file, text_key)
        elif kind in JSONL_SUFFIXES:
            yield from _read_lines(file)
        else:
            yield from _read_text(file, per_line)
    except UNPACKING_ERRORS as error:
        raise _unreadable(file, f"cannot be read ({explain(error)})") from None


def _unreadable(file: Path, what: str) -> DataError:
    """Of a file as a whole, which --skip-damaged does not pass over: nobody could say how many documents are lost."""
    name = quote(escape(file.name))
    return DataError(f"{file}: {what}; mend it, or leave it out: in a folder with --exclude {name}")


def _lines(file: Path) -> Iterator[tuple[int, bytes, int]]:
    """Line number from 1, line without its end, bytes of the file (packed, if it is) that it accounts for."""
    with open(file, "rb") as packed:
        stream = unpacked(file, packed)
        before = 0
        for number, line in enumerate(stream, 1):
            used = len(line) if stream is packed else packed.tell() - before
            before += used
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            yield number, line.rstrip(b"\r\n"), used


def _read_lines(file: Path) -> Iterator[Record]:
    for number, line, used in _lines(file):
        if line.strip():
            yield Record(line, f"{file}:{number}", used, is_json=True)


def _read_text(file: Path, per_line: bool) -> Iterator[Record]:
    if per_line:
        for number, line, used in _lines(file):
            if line.strip():
                yield Record(line, f"{file}:{number}", used)
        return
    with open(file, "rb") as packed:
        yield Record(unpacked(file, packed).read().removeprefix(BOM_UTF8), str(file), file.stat().st_size)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}: {error.reason})") from None


def _read_parquet(file: Path, text_key: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise _unreadable(file, f"not a Parquet file ({error})") from None
    names = table.schema_arrow.names
    if text_key not in names:
        raise DataError(f"{file}: no column {text_key!r} (columns: {', '.join(names)}); choose with --text-key")
    kind = table.schema_arrow.field(text_key).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise DataError(f"{file}: the column {text_key!r} holds {kind}, not strings; choose with --text-key")
    share = file.stat().st_size // max(1, table.metadata.num_rows)
    row = 0
    try:
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            for text in batch.column(0).cast(pa.large_binary()).to_pylist():  # Parquet does not promise UTF-8
                row += 1
                yield Record(text, f"{file}, row {row}", share)
    except pa.ArrowInvalid as error:  # other damage is an OSError
        raise _unreadable(file, f"cannot be read ({error})") from None
