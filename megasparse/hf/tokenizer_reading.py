"""Whether transformers encodes with a tokenizer as training did.

Training takes a tokenizer.json as it is. `AutoTokenizer` asks for the model's type and for `tokenizer_class` first, and
from transformers 5 on most classes take vocabulary and merges alone from the file and split text by rules of their own;
for a model of type qwen2 it is `Qwen2Tokenizer` whatever the files say. A model then gets other tokens than it knows,
and nothing tells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasparse.small_files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_WORDS = 20_000
_HARD = (
    "It's 2024, DON'T   pay 1234567.89 €!\r\n\n\tdef f(x_1):\n        return x_1**2  # naïve e\u0301cole ﬁn\n\n"
    "北京 東京 Привет مرحبا 🙂🙃 ²½ Ⅷ\u00a0\u3000end "
)


def load(folder: Path) -> Any:
    """The tokenizer of a model's folder, as `AutoTokenizer` makes it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def encodes_alike(folder: Path, tokenizer: Any) -> bool:
    """Whether `tokenizer`, which was loaded from the folder, encodes as the tokenizer.json there.

    Compared on text that tokenizers split in different ways, and on the words of the vocabulary. A folder without
    tokenizer.json has nothing else to compare with.
    """
    from tokenizers import Tokenizer

    if not (folder / FILE).is_file():
        return True
    own = Tokenizer.from_file(str(folder / FILE))
    own.no_truncation()
    own.no_padding()
    texts = _texts(own, set(tokenizer.get_added_vocab()))
    expected = [encoding.ids for encoding in own.encode_batch(texts, add_special_tokens=False)]
    return bool(tokenizer(texts, add_special_tokens=False)["input_ids"] == expected)


def is_of_qwen2(folder: Path, tokenizer: Any) -> bool:
    """Whether the folder's tokenizer is that of Qwen2 models, for every version of transformers: the one installed here
    loaded `tokenizer`, and versions before 5 go by the class that the files name."""
    named = str(read_json(folder / SETTINGS).get("tokenizer_class")).removesuffix("Fast")
    return encodes_alike(folder, tokenizer) and (named == "Qwen2Tokenizer" or not (folder / FILE).is_file())


def take_file_as_it_is(folder: Path) -> None:
    """Name the class in tokenizer_config.json that takes all of tokenizer.json, in transformers 4 and 5."""
    settings = {**read_json(folder / SETTINGS), "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _texts(own: Tokenizer, added: set[str]) -> list[str]:
    """Without the tokens that `AutoTokenizer` adds: it knows of more of them than the file, from its settings."""
    ids = [[number] for number in sorted(own.get_vocab().values())]
    words = own.decode_batch(ids[:: len(ids) // _WORDS + 1])
    words = [word for word in words if not any(token in word for token in added)]
    return [_HARD, *(" ".join(words[start : start + 100]) for start in range(0, len(words), 100))]
