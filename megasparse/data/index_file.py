"""The two files of a Megatron data set: writing them, and whether they are whole. Needs neither torch nor Megatron."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type of a token, number of sequences, number of document bounds."""
_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
"""Of a token: the header holds the place of one of them, counted from 1."""
_PART = 1 << 20
"""Entries of the index that are made at a time."""


class DatasetWriter:
    """Writes `prefix`.bin and, at the end, `prefix`.idx: one sequence a document, as Megatron's
    IndexedDatasetBuilder would.

    In memory are four bytes a document. That builder takes 140, which is more than a machine has for the billions of
    documents of a large corpus.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.dtype = np.dtype(np.uint16 if vocab_size < 65500 else np.int32)  # the builder's own limit
        self._tokens = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115
        self._index = Path(f"{prefix}.idx")
        self._lengths = array("i")

    def add(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        """Documents one after the other; `lengths` of each, in tokens."""
        self._tokens.write(tokens.astype(self.dtype).data)
        self._lengths.extend(lengths)

    def close(self) -> None:
        """Without an index the data is not finished."""
        self._tokens.close()

    def finish(self) -> None:
        self.close()
        lengths = np.frombuffer(self._lengths, np.int32)
        kind = 1 + _TYPES.index(self.dtype.name)
        with self._index.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, kind, len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            begin = 0
            for start in range(0, len(lengths), _PART):
                ends = begin + np.cumsum(lengths[start : start + _PART], dtype=np.int64) * self.dtype.itemsize
                file.write(np.concatenate([[begin], ends[:-1]]).astype(np.int64).data)
                begin = int(ends[-1])
            for start in range(0, len(lengths) + 1, _PART):
                file.write(np.arange(start, min(start + _PART, len(lengths) + 1), dtype=np.int64).data)


def damage(prefix: str) -> str | None:
    """What is wrong with `prefix`.bin or `prefix`.idx, which must be there; None: nothing.

    Found from their sizes and a few numbers of the index. Megatron maps both files and finds out that one is cut short
    when a sample lies behind the cut: perhaps hours later.
    """
    tokens, index = Path(prefix + ".bin"), Path(prefix + ".idx")
    size = index.stat().st_size
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            return f"{index} is not the index of a Megatron data set"
        _, _, kind, sequences, bounds = _HEADER.unpack(header)
        if not 1 <= kind <= len(_TYPES):
            return f"{index} holds tokens of type {kind}, which Megatron does not have"
        lengths = _HEADER.size  # int32 each; then where each sequence begins and the bounds, int64 each
        begins = lengths + 4 * sequences
        whole = begins + 8 * (sequences + bounds)
        if size != whole:
            return f"{index} has {size} bytes instead of {whole}"
        counted = 0
        if sequences:
            file.seek(begins - 4)
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(begins + 8 * (sequences - 1))
            (begin,) = struct.unpack("<q", file.read(8))
            counted = begin + length * np.dtype(_TYPES[kind - 1]).itemsize
    actual = tokens.stat().st_size
    if actual != counted:
        return f"{tokens} has {actual} bytes, and its index counts {counted}"
    return None


def parts_of(file: Path, blocks: int, length: int, unit: int = 1) -> Iterator[bytes]:
    """`blocks` parts of `length` units of `unit` bytes, at equal distances, first and last included; where the file is
    so short that some are the same, each once."""
    last = max(0, file.stat().st_size // unit - length)
    with file.open("rb") as stream:
        for start in sorted({last * block // (blocks - 1) for block in range(blocks)}):
            stream.seek(start * unit)
            yield stream.read(length * unit)


def fingerprint(prefix: str, blocks: int = 16, length: int = 1 << 16) -> str:
    """Of the lengths of all documents of a data set that is whole: the sizes of its files, and `blocks` parts of its
    index of `length` bytes. Where each document begins is in it, so that one length that changes changes much of it."""
    index, tokens = Path(prefix + ".idx"), Path(prefix + ".bin")
    digest = hashlib.sha256(f"{index.stat().st_size} {tokens.stat().st_size}".encode())
    for part in parts_of(index, blocks, length):
        digest.update(part)
    return digest.hexdigest()[:16]


def largest_token(prefix: str, blocks: int = 16, length: int = 1 << 14) -> int:
    """Of `blocks` parts of `length` tokens, spread over a data set that is whole; -1 where it holds none."""
    with Path(prefix + ".idx").open("rb") as index:
        kind = _HEADER.unpack(index.read(_HEADER.size))[2]
    dtype = np.dtype(_TYPES[kind - 1])
    parts = parts_of(Path(prefix + ".bin"), blocks, length, dtype.itemsize)
    return max((int(np.frombuffer(part, dtype).max()) for part in parts if part), default=-1)
