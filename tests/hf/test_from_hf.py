"""Imported models: bit-identical after the way back, and at TP 2 x PP 2 the logits that transformers computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM

from megasparse.config import ModelConfig, load_config
from megasparse.hf.config import to_hf_config
from megasparse.hf.errors import ConvertError
from megasparse.hf.from_hf import FromHf, convert_from_hf
from megasparse.hf.hashes import hash_tensors
from megasparse.hf.to_hf import ToHf, convert_to_hf
from tests.hf.cases import MODELS, VOCABULARY, config_of, contents, inputs
from tests.launch import run_distributed

CONFIG_FIELDS = (
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "vocab_size", "initializer_range", "dtype", "hidden_act", "eos_token_id", "bos_token_id",
)  # fmt: skip


def make_model(name: str, folder: Path, activation: str = "relu", dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model of one of MODELS, made by transformers, with random norms and biases; saved in `folder`."""
    model = ModelConfig.model_validate(config_of(name)["model"])
    raw = to_hf_config(model, model.vocab_size or 0, 256, "float32", {"eos_token_id": 3, "bos_token_id": 2})
    config = AutoConfig.for_model(**{**raw, "hidden_act": activation})
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if parameter.dim() == 1 and not key.endswith("o_proj.bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape))
    built = built.to(dtype).eval()
    built.save_pretrained(folder, max_shard_size="30KB")
    return built


def logits_of(model: Any, vocabulary: int = VOCABULARY) -> np.ndarray:
    with torch.no_grad():
        return model.float()(inputs(vocabulary)).logits.numpy()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> None:
    """Change the weights and config.json of a model's folder; the weights end up in one file."""
    tensors = weights_of(folder)
    change(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    values.update(config)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS), ("qwen2", torch.bfloat16), ("arcee", torch.float16)],
)
def test_the_way_back_is_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_model(name, tmp_path / "in", dtype=dtype)
    before = contents(tmp_path / "in")
    result = convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    assert result.dtype == dtype
    convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "out"))
    original, back = weights_of(tmp_path / "in"), weights_of(tmp_path / "out")
    assert original.keys() == back.keys()
    assert all(torch.equal(tensor, back[key]) and tensor.dtype == back[key].dtype for key, tensor in original.items())
    first, second = (AutoConfig.from_pretrained(tmp_path / folder) for folder in ("in", "out"))
    for field in CONFIG_FIELDS:
        if field not in ("eos_token_id", "bos_token_id"):
            assert getattr(first, field) == getattr(second, field), field
    assert contents(tmp_path / "in") == before


def test_megatron_computes_and_saves_the_same_at_any_layout(tmp_path: Path) -> None:
    expected, cases = {}, []
    for name in ("llama-tied", "llama-untied-gqa-scaled", "qwen3-bias", "arcee-bias"):
        built = make_model(name, tmp_path / name / "in")
        vocabulary = built.config.vocab_size
        expected[name] = logits_of(built, vocabulary)
        convert_from_hf(FromHf(tmp_path / name / "in", tmp_path / name / "checkpoint"))
        cases.append((name, tmp_path / name / "checkpoint", vocabulary))
    found = run_distributed(4, "tests.hf.cases:load_all", cases)[-1]
    for name, logits in found.items():
        assert np.abs(expected[name]).max() > 0.5
        assert np.abs(logits - expected[name]).max() < 1e-5, name
        assert list(hash_tensors(tmp_path / name / "in")) == list(hash_tensors(tmp_path / name / "saved-again"))


def test_mistral_without_a_window_comes_back_as_llama(tmp_path: Path) -> None:
    """With heads of their own width, as Mistral Nemo has them."""
    make_model("llama-wide-heads", tmp_path / "llama")
    raw = json.loads((tmp_path / "llama/config.json").read_text())
    settings = {**raw, "model_type": "mistral", "sliding_window": None, "hidden_act": "relu"}
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    built.save_pretrained(tmp_path / "in")
    convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    assert convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "out")).architecture == "LlamaForCausalLM"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(built).__name__ == "MistralForCausalLM"
    assert np.array_equal(logits_of(back, 64), logits_of(built, 64))


def test_another_activation_becomes_relu_and_is_said(tmp_path: Path) -> None:
    built = make_model("qwen3", tmp_path / "in", activation="silu")
    result = convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    assert any("silu" in note and "relu" in note for note in result.notes)
    convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "out"))
    dense = logits_of(built)
    relu = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert np.abs(dense - relu).max() > 0.01
    comparison = run_distributed(1, "tests.hf.cases:verify", tmp_path / "checkpoint", tmp_path / "in")[0]
    assert comparison.passed
    assert comparison.same_top == comparison.tokens
    assert comparison.logits < 1e-5


def test_configuration_to_build_on(tmp_path: Path) -> None:
    make_model("llama-untied-gqa-scaled", tmp_path / "in")
    convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    run = tmp_path / "run.yaml"
    run.write_text(f"base: {tmp_path}/checkpoint/model.yaml\ntraining: {{global_batch_size: 4, steps: 10}}\n")
    cfg = load_config(run, ["parallel.tensor=2", "data.blend=text"])
    assert cfg.checkpoint.load == str(tmp_path / "checkpoint")
    assert cfg.training.precision == "fp32"
    assert cfg.data.tokenizer is None
    expected = ModelConfig.model_validate(config_of("llama-untied-gqa-scaled")["model"])
    same = ("num_layers", "query_groups", "head_width", "norm_epsilon", "rotary_base", "rope_scaling", "tie_embeddings")
    assert all(getattr(cfg.model, key) == getattr(expected, key) for key in same)
    assert (cfg.model.vocab_size, cfg.max_position_embeddings, cfg.data.sequence_length) == (VOCABULARY, 256, 256)


def publish(folder: Path, gated: bool, layout: str) -> Any:
    """A model in the layout of the published sparse checkpoints. Returns what computes the same in transformers.

    Args:
        layout: "standard"; "by-neuron", as training with their hybrid kernels leaves down_proj; "inference" and
            "packed", as their two inference paths name and store the weights.
    """
    built = make_model("llama-tied" if gated else "arcee", folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            prefix = name.rpartition(".mlp.")[0] + ".mlp."
            if layout == "by-neuron" and name.endswith("down_proj.weight"):
                tensors[name] = tensors[name].t()
            if layout == "inference" and name.endswith("gate_proj.weight"):
                tensors[prefix + "gate_weight"] = tensors.pop(name).t()
            if layout == "inference" and name.endswith("up_proj.weight"):
                tensors[prefix + "up_weight"] = tensors.pop(name) if gated else tensors.pop(name).t()
            if layout == "inference" and name.endswith("down_proj.weight"):
                tensors[prefix + "down_weight"] = tensors.pop(name).t()
            if layout == "packed" and ".mlp." in name:
                kind = name.removeprefix(prefix).removesuffix("_proj.weight").upper()
                tensors[prefix + kind] = tensors.pop(name).t() if kind == "DOWN" else tensors.pop(name)
        for layer in range(4):
            tensors[f"tracker.last_activated.{layer}"] = torch.zeros(48, dtype=torch.int64)
            tensors[f"model.layers.{layer}.mlp.tracker.last_activated"] = torch.zeros(48, dtype=torch.int64)
        tensors["metrics_accumulator.counts"] = torch.zeros(1)

    rewrite(
        folder,
        change,
        model_type="llama_sparse_relu",
        architectures=["SparseLlamaForCausalLM"],
        auto_map={"AutoConfig": "sparse_models.SparseLlamaConfig"},
        hidden_act="silu",
        intermediate_size=999,
        sparsity_new_intermediate_size=48,
        sparsity_gated_mlp=gated,
        sparsity_l1_coeff=2e-5,
        sparsity_use_hybrid_kernel=layout == "by-neuron",
        sparsity_max_seq_length=2048,
    )
    return built


@pytest.mark.parametrize(
    ("gated", "layout"),
    [
        (True, "standard"), (True, "by-neuron"), (True, "inference"), (True, "packed"),
        (False, "standard"), (False, "inference"), (False, "packed"),
    ],
)  # fmt: skip
def test_published_sparse_layout(gated: bool, layout: str, tmp_path: Path) -> None:
    built = publish(tmp_path / "in", gated, layout)
    result = convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    assert [note for note in result.notes if "activation" in note] == []
    convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "out"))
    back = weights_of(tmp_path / "out")
    state = built.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in back.items())
    comparison = run_distributed(1, "tests.hf.cases:verify", tmp_path / "checkpoint", tmp_path / "in")[0]
    assert comparison.different == []
    assert comparison.logits < 1e-5


def test_a_square_transposed_down_proj_must_be_said(tmp_path: Path) -> None:
    publish(tmp_path / "in", gated=True, layout="standard")
    generator = torch.Generator().manual_seed(1)

    def square(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if ".mlp." in name and "tracker" not in name:
                tensors[name] = torch.randn(32, 32, generator=generator)

    rewrite(tmp_path / "in", square, sparsity_new_intermediate_size=32, sparsity_use_hybrid_kernel=True)
    with pytest.raises(ConvertError, match="--down-proj by-neuron or --down-proj standard"):
        convert_from_hf(FromHf(tmp_path / "in", tmp_path / "out"))
    original = weights_of(tmp_path / "in")["model.layers.1.mlp.down_proj.weight"]
    for by_neuron in (True, False):
        folder = tmp_path / str(by_neuron)
        convert_from_hf(FromHf(tmp_path / "in", folder / "checkpoint", down_by_neuron=by_neuron))
        convert_to_hf(ToHf(folder / "checkpoint", folder / "out"))
        back = weights_of(folder / "out")["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(back, original.t() if by_neuron else original)


def _pop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("name", "change", "config", "expected"),
    [
        (
            "llama-tied",
            _pop("model.layers.3.mlp.up_proj.weight"),
            {},
            "a tensor is missing: model.layers.3",
        ),
        ("llama-tied", lambda tensors: None, {"num_hidden_layers": 5}, "missing, the first is model.layers.4"),
        ("llama-tied", lambda tensors: None, {"num_hidden_layers": 3}, "holds model.layers.3"),
        (
            "llama-tied",
            lambda tensors: None,
            {"intermediate_size": 52},
            "gate_proj.weight is .48, 32., and config.json",
        ),
        ("llama-tied", _put("lm_head.weight", torch.zeros(60, 32)), {}, "differs from the embedding"),
        ("llama-tied", _put("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(2)), {}, "adapter"),
        ("arcee-bias", _put("model.layers.0.self_attn.o_proj.bias", torch.ones(32)), {}, "o_proj.bias is not zero"),
        ("llama-tied", _put("model.norm.weight", torch.ones(32, dtype=torch.int8)), {}, "is of type torch.int8"),
        ("llama-untied-gqa-scaled", _pop("lm_head.weight"), {}, "is missing: lm_head.weight"),
    ],
)
def test_what_does_not_fit_is_named(
    name: str, change: Callable[[dict[str, torch.Tensor]], Any], config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    make_model(name, tmp_path / "in")
    rewrite(tmp_path / "in", change, **config)
    before = contents(tmp_path / "in")
    with pytest.raises(ConvertError, match=expected) as caught:
        convert_from_hf(FromHf(tmp_path / "in", tmp_path / "out"))
    assert re.search(re.escape(str(tmp_path / "in")), str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert contents(tmp_path / "in") == before


@pytest.mark.parametrize(("tied_as", "zipped"), [("both", True), ("lm_head.weight", True), ("both", False)])
def test_a_pickled_and_a_tied_output_layer_are_read(tied_as: str, zipped: bool, tmp_path: Path) -> None:
    built = make_model("llama-tied", tmp_path / "in")
    tensors = weights_of(tmp_path / "in")
    for file in (tmp_path / "in").glob("*.safetensors*"):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if tied_as != "both":
        del tensors["model.embed_tokens.weight"]
    torch.save(tensors, tmp_path / "in/pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "in")
        .get_input_embeddings()
        .weight.equal(built.get_input_embeddings().weight)
    )
    convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint"))
    convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "out"))
    back = weights_of(tmp_path / "out")
    assert "lm_head.weight" not in back
    state = built.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in back.items())


def test_a_full_disk_and_an_interruption_leave_nothing(tmp_path: Path) -> None:
    import resource

    make_model("llama-tied", tmp_path / "in")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(ConvertError, match="writing failed"):
            convert_from_hf(FromHf(tmp_path / "in", tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_from_hf(FromHf(tmp_path / "in", tmp_path / "out"), interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    make_model("llama-tied", tmp_path / "in")
    vocabulary = {f"w{i}": i for i in range(VOCABULARY + 1)}
    Tokenizer(WordLevel(vocabulary, unk_token="w1")).save(str(tmp_path / "in/tokenizer.json"))
    with pytest.raises(ConvertError, match=r"has 61 tokens, and config\.json says vocab_size 60; .* --no-tokenizer"):
        convert_from_hf(FromHf(tmp_path / "in", tmp_path / "out"))
    (tmp_path / "in").rename(tmp_path / "damaged")
    (tmp_path / "damaged/tokenizer.json").write_text("{}")
    with pytest.raises(ConvertError, match=r"damaged: its tokenizer is not a readable tokenizer .* --no-tokenizer"):
        convert_from_hf(FromHf(tmp_path / "damaged", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
    convert_from_hf(FromHf(tmp_path / "damaged", tmp_path / "out", no_tokenizer=True))
    assert not (tmp_path / "out/hf/tokenizer.json").exists()
    overrides = ["training.global_batch_size=1", "training.steps=1"]
    assert load_config(tmp_path / "out/model.yaml", overrides).data.tokenizer is None


def _truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def _foreign(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].write_text("<html>not found</html>")


def _rewrite_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_truncate, r"model-00002-of-\d+\.safetensors: truncated or not a file of weights .* download it again"),
        (_foreign, r"model-00002-of-\d+\.safetensors: truncated or not a file of weights .* download it again"),
        (
            lambda folder: next(folder.glob("model-00003*")).unlink(),
            r"model-00003-of-\d+\.safetensors: missing; download",
        ),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: not there; give the folder"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read .* download"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            r"index\.json: not an index of weights",
        ),
        (_rewrite_config(model_type="gpt2"), "model_type 'gpt2' is not supported; supported are llama, "),
        (_rewrite_config(vocab_size=61), r"embed_tokens\.weight is \[60, 32\], and config\.json says \[61, 32\]"),
        (_rewrite_config(quantization_config={"bits": 4}), "the weights are quantised"),
        (
            _rewrite_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "rope_scaling of type 'yarn' is not supported",
        ),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_model_is_named(damage: Callable[[Path], None], expected: str, tmp_path: Path) -> None:
    make_model("llama-tied", tmp_path / "in")
    damage(tmp_path / "in")
    before = contents(tmp_path / "in")
    with pytest.raises(ConvertError, match=expected) as caught:
        convert_from_hf(FromHf(tmp_path / "in", tmp_path / "out"))
    assert str(tmp_path / "in") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert contents(tmp_path / "in") == before


def test_weights_of_several_types_lose_nothing(tmp_path: Path) -> None:
    make_model("llama-tied", tmp_path / "in")

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "norm" in name:
                tensors[name] = tensors[name].bfloat16()

    rewrite(tmp_path / "in", mix)
    assert convert_from_hf(FromHf(tmp_path / "in", tmp_path / "checkpoint")).dtype == torch.float32
    convert_to_hf(ToHf(tmp_path / "checkpoint", tmp_path / "out"))
    original, back = weights_of(tmp_path / "in"), weights_of(tmp_path / "out")
    assert all(torch.equal(tensor.float(), back[name]) for name, tensor in original.items())


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    make_model("llama-tied", tmp_path / "in")
    rewrite(tmp_path / "in", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e9))
    with pytest.raises(ConvertError, match=r"linear_fc1\.weight of layer 1 has values beyond float16's range"):
        convert_from_hf(FromHf(tmp_path / "in", tmp_path / "out", dtype="fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
