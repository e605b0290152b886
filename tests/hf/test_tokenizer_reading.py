"""AutoTokenizer gives an exported model the tokens that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from megasparse.hf.from_hf import FromHf, convert_from_hf
from megasparse.hf.to_hf import ToHf, convert_to_hf
from tests.hf.cases import config_of, write_plain
from tests.hf.test_from_hf import make_model, rewrite

TEXT = "It's 2024 and 123456, DON'T  pay\n\n\nnaïve e\u0301cole "
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SIZE = 420


def split_by(pattern: str) -> Any:
    """A rule of splitting, as Llama 3 and Qwen2 have it in tokenizer.json."""
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), by_bytes])


def trained(rule: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = rule, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT * 50],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]),
    )
    return tokenizer


def qwen2() -> Tokenizer:
    return trained(split_by(SPLIT.replace("{1,%d}", "")), normalizers.NFC())


def export(name: str, tokenizer: Tokenizer, class_name: str | None, folder: Path) -> list[str]:
    """A checkpoint of one of MODELS that was trained with a tokenizer, exported to `folder/out`. Returns the notes."""
    raw = config_of(name)
    raw["model"]["vocab_size"] = SIZE
    checkpoint = write_plain(folder / "checkpoint", raw)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    if class_name is not None:
        settings = {"tokenizer_class": class_name, "eos_token": "<|endoftext|>"}
        (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    return convert_to_hf(ToHf(checkpoint, folder / "out", tokenizer=str(folder / "tokenizer"))).notes


@pytest.mark.parametrize(
    ("name", "rule", "class_name", "architecture", "note"),
    [
        ("qwen2", None, "PreTrainedTokenizerFast", "LlamaForCausalLM", "LlamaForCausalLM with biases"),
        ("qwen2", None, "Qwen2Tokenizer", "LlamaForCausalLM", "LlamaForCausalLM with biases"),
        ("qwen3", None, "Qwen2Tokenizer", "Qwen3ForCausalLM", "as Qwen2Tokenizer transformers encodes otherwise"),
        ("qwen3", None, None, "Qwen3ForCausalLM", None),
        ("llama-tied", SPLIT % 3, "GPT2Tokenizer", "LlamaForCausalLM", "as GPT2Tokenizer transformers encodes"),
        ("llama-tied", SPLIT % 3, "PreTrainedTokenizerFast", "LlamaForCausalLM", None),
    ],
)
def test_an_export_s_tokens_are_those_of_training(
    name: str, rule: str | None, class_name: str | None, architecture: str, note: str | None, tmp_path: Path
) -> None:
    own = trained(split_by(rule) if rule else pre_tokenizers.ByteLevel(add_prefix_space=False))
    notes = export(name, own, class_name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == own.encode(TEXT).ids
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [architecture]
    said = "; ".join(notes)
    assert (note in said) if note else ("otherwise" not in said and "biases" not in said)


def test_a_qwen2_model_keeps_its_tokenizer_and_type(tmp_path: Path) -> None:
    own = qwen2()
    notes = export("qwen2", own, "Qwen2Tokenizer", tmp_path)
    assert notes == [f"the tokenizer uses {own.get_vocab_size()} of the model's {SIZE} tokens"]
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen2"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == own.encode(TEXT).ids


def test_llama_with_biases_computes_what_qwen2_computes(tmp_path: Path) -> None:
    export("qwen2", trained(pre_tokenizers.ByteLevel()), "PreTrainedTokenizerFast", tmp_path)
    convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "qwen2", no_tokenizer=True))
    tokens = torch.randint(SIZE, (2, 20), generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in ("out", "qwen2"):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert torch.equal(*logits)
    assert logits[0].abs().max() > 1


def test_a_tokenizer_of_vocabulary_and_merges_alone_comes_back(tmp_path: Path) -> None:
    """transformers finds its class by the model's type."""
    make_model("qwen2", tmp_path / "in")
    own = qwen2()
    rewrite(tmp_path / "in", lambda tensors: [_widen(tensors, name) for name in ("model.embed_tokens", "lm_head")],
            vocab_size=SIZE)  # fmt: skip
    model = json.loads(own.to_str())["model"]
    (tmp_path / "in/vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "in/merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "out"))
    first, second = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("in", "out"))
    assert second(TEXT)["input_ids"] == first(TEXT)["input_ids"] == own.encode(TEXT).ids


def _widen(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.weight"] = torch.zeros(SIZE, tensors[f"{name}.weight"].shape[1])
