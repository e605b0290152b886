"""What the tests of preprocessing share."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

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
