"""What all training tests share: data and a tokenizer, and the process whose forks train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.cases import write_data, write_tokenizer
from tests.training.forked import Helper


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b`: two data sets; `tokenizer.json`: their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "a", 200, seed=0)
    write_data(folder / "b", 100, seed=1)
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def helper() -> Iterator[Helper]:
    helper = Helper()
    yield helper
    helper.close()
