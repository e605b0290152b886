"""config.json <-> `model`: nothing is lost, nothing unsupported is let through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megasparse.config import ModelConfig
from megasparse.hf.architectures import architecture_of
from megasparse.hf.config import read_hf_config, to_hf_config
from megasparse.hf.errors import ConvertError
from tests.hf.cases import ARCHITECTURES, MODELS, config_of


def write(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_model_survives_the_round_trip(name: str, tmp_path: Path) -> None:
    model = ModelConfig.model_validate(config_of(name)["model"])
    assert architecture_of(model).class_name == ARCHITECTURES[name]
    config = to_hf_config(model, 60, 512, "bfloat16", {"eos_token_id": 3})
    described = read_hf_config(write(tmp_path, **config))
    back = described.model
    for key in ModelConfig.model_fields:
        if key in ("num_query_groups", "kv_channels", "max_position_embeddings", "make_vocab_size_divisible_by"):
            continue
        expected = 60 if key == "vocab_size" else getattr(model, key)
        assert getattr(back, key) == expected, key
    assert (back.query_groups, back.head_width) == (model.query_groups, model.head_width)
    assert (described.max_position_embeddings, described.activation) == (512, "relu")
    assert [config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [None, 3, None]
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    model = ModelConfig.model_validate(config_of(name)["model"])
    write(tmp_path, **to_hf_config(model, 60, 512, "float32", {}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.hidden_act == "relu"
    assert config.rms_norm_eps == model.norm_epsilon
    assert config.rope_parameters["rope_theta"] == model.rotary_base
    assert config.rope_parameters["rope_type"] == ("llama3" if model.rope_scaling else "default")
    assert config.tie_word_embeddings == model.tie_embeddings
    assert config.eos_token_id is None
    assert config.bos_token_id is None


def test_what_config_json_leaves_out_is_the_architecture_s_default(tmp_path: Path) -> None:
    model = read_hf_config(write(tmp_path, model_type="qwen2", **SMALL)).model
    assert model.norm_epsilon == 1e-6
    assert model.qkv_bias
    assert not model.tie_embeddings
    assert model.rotary_base == 10000.0


def test_published_layout(tmp_path: Path) -> None:
    described = read_hf_config(
        write(
            tmp_path,
            model_type="llama_sparse_relu",
            architectures=["SparseLlamaForCausalLM"],
            hidden_act="silu",
            sparsity_new_intermediate_size=64,
            sparsity_gated_mlp=False,
            sparsity_l1_coeff=2e-5,
            rope_theta=100000,
            tie_word_embeddings=True,
            **SMALL,
        )
    )
    assert described.activation == "relu"
    assert described.model.ffn_hidden_size == 64
    assert not described.model.gated
    assert described.model.rotary_base == 100000.0
    assert described.down_by_neuron is False
    hybrid = read_hf_config(write(tmp_path, model_type="qwen2_sparse_relu", sparsity_use_hybrid_kernel=True, **SMALL))
    assert hybrid.down_by_neuron is None
    assert hybrid.model.qkv_bias


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding"),
        ({"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"model_type": "mistral"}, "sliding-window attention .sliding_window. is not supported"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "describes no model .num_layers is 0.; repair it"),
        ({"model_type": "llama", "hidden_size": "wide"}, "transformers refuses it [^\n]*hidden_size[^\n]*got str"),
        ({"layers": 3}, "no model_type"),
    ],
)
def test_what_is_not_supported_is_refused(values: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=expected) as caught:
        read_hf_config(write(tmp_path, **{**SMALL, **values}))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_missing_and_a_damaged_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"config\.json: not there"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConvertError, match=r"config\.json: cannot be read"):
        read_hf_config(tmp_path)


def test_models_without_a_stock_architecture_are_refused() -> None:
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "vocab_size": 4}
    with pytest.raises(ConvertError, match="rmsnorm"):
        architecture_of(ModelConfig(num_attention_heads=2, normalization="layernorm", **sizes))
    with pytest.raises(ConvertError, match="multiple of"):
        architecture_of(ModelConfig(num_attention_heads=3, kv_channels=4, **sizes))
