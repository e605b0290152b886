"""Reading packed files: gzip, bzip2, xz and Zstandard, by the end of their names."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO, cast

PACKED = (".gz", ".bz2", ".xz", ".zst")
NOT_READ = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".lzma", ".lz", ".br", ".z")
"""Archives, and what is packed in other ways. As text a tar archive may well pass for UTF-8."""

UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file that is damaged, cut short or not packed at all may raise."""


def inner_suffix(file: Path) -> str:
    """The suffix of what a file holds, in small letters: `.jsonl` of `a.jsonl`, `a.jsonl.zst` and `A.JSONL`."""
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def unpacked(file: Path, stream: BinaryIO) -> BinaryIO:
    """The content of `stream`, which is `file` opened. Several packed one after the other are read as one."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.BZ2File(stream))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(stream))
    if suffix == ".zst":
        import pyarrow as pa  # Python's own from 3.14 on

        return io.BufferedReader(pa.CompressedInputStream(stream, "zstd"))
    return stream


def explain(error: Exception) -> str:
    """For a message; one of `UNPACKING_ERRORS`."""
    if "too much memory" in str(error):  # of Zstandard
        return f"{error}; it was packed with a long window: unpack it with zstd -d --long=31"
    return str(error)
