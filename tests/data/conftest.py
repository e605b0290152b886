"""A tokenizer trained on a few texts."""

from __future__ import annotations

import pytest

from megasparse.data.tokenizer import TextTokenizer, train_tokenizer
from tests.data.helpers import TEXTS


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(iter(TEXTS * 4), 400, tmp_path_factory.mktemp("tokenizer"))
