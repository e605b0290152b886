"""The model's configuration: `model` of our YAML <-> config.json of transformers."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from megasparse.config import ModelConfig, RopeScaling
from megasparse.hf.architectures import ARCHITECTURES, Architecture, architecture_of
from megasparse.hf.errors import ConvertError
from megasparse.hf.published import SUFFIX


@dataclass(frozen=True)
class SourceModel:
    """A model in Hugging Face format, as its config.json describes it."""

    architecture: Architecture
    model: ModelConfig
    activation: str
    """Its activation function; what is not "relu" becomes ReLU."""
    output_bias: bool
    """A bias of the attention's output, which must be zero: Megatron's attention here has none."""
    mlp_bias: bool
    """Biases of the MLP, which must be zero."""
    max_position_embeddings: int
    down_by_neuron: bool | None
    """down_proj is stored [neurons, hidden] instead of [hidden, neurons]; None: its shape must tell."""
    published: bool
    """In the layout of the published sparse checkpoints, which transformers does not load by itself."""


def to_hf_config(
    model: ModelConfig,
    vocab_size: int,
    max_position_embeddings: int,
    dtype: str,
    token_ids: dict[str, Any],
    architecture: Architecture | None = None,
) -> dict[str, Any]:
    """config.json of the exported model.

    Rotary settings are written under the names of transformers 4 (`rope_theta`, `rope_scaling`), which other readers
    know too, and of transformers 5 (`rope_parameters`).

    Args:
        dtype: "float32", "bfloat16" or "float16".
        token_ids: bos_token_id and so on; what is missing becomes null, not the architecture's default.
        architecture: None: that of `architecture_of(model)`.
    """
    architecture = architecture or architecture_of(model)
    scaling: dict[str, Any] | None = None
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **model.rope_scaling.model_dump(exclude={"type"})}
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_act": "relu",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_width,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rotary_base, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": token_ids.get("bos_token_id"),
        "eos_token_id": token_ids.get("eos_token_id"),
        "pad_token_id": token_ids.get("pad_token_id"),
    }
    if architecture.bias == "key":
        config["attention_bias"] = model.qkv_bias
    if architecture.model_type in ("llama", "arcee"):
        config["mlp_bias"] = False
    return config


def read_hf_config(folder: Path) -> SourceModel:
    """Understand config.json of a model to import.

    Raises:
        ConvertError: it is missing, unreadable, or asks for something that this package does not compute.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConvertError(f"{path}: not there; give the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path}: cannot be read ({error}); download the model again") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ConvertError(f"{path}: has no model_type; it is not the config.json of a transformers model")
    model_type = raw["model_type"].removesuffix(SUFFIX)
    published = model_type != raw["model_type"] or any(key.startswith("sparsity_") for key in raw)
    if model_type not in ARCHITECTURES:
        raise ConvertError(
            f"{path}: model_type {raw['model_type']!r} is not supported; supported are {', '.join(ARCHITECTURES)} "
            "and the "
            f"published sparse layouts ({'llama' + SUFFIX}, {'qwen2' + SUFFIX})"
        )
    architecture = ARCHITECTURES[model_type]
    values = _with_defaults(path, model_type, raw)
    activation, width = values["hidden_act"], values["intermediate_size"]
    down_by_neuron: bool | None = False
    if published:
        # The classes that wrote these replace every MLP, whatever hidden_act and intermediate_size say.
        activation = "relu"
        width = raw.get("sparsity_new_intermediate_size") or width
        gated = bool(raw.get("sparsity_gated_mlp", True))
        # Training with their hybrid kernels (for gated MLPs) leaves down_proj transposed, under the same name.
        down_by_neuron = None if raw.get("sparsity_use_hybrid_kernel") and gated else False
        if not gated:
            architecture = Architecture(model_type, architecture.class_name, gated=False, bias=architecture.bias)
    _refuse_others(path, values)
    bias = architecture.bias == "qkv" or bool(values.get("attention_bias"))
    theta, scaling = _rotary(path, values)
    try:
        model = ModelConfig(
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=width,
            num_attention_heads=values["num_attention_heads"],
            num_query_groups=values.get("num_key_value_heads") or values["num_attention_heads"],
            kv_channels=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
            gated=architecture.gated,
            vocab_size=values["vocab_size"],
            max_position_embeddings=values["max_position_embeddings"],
            norm_epsilon=float(values["rms_norm_eps"]),
            rotary_base=theta,
            rope_scaling=scaling,
            qkv_bias=bias,
            qk_norm=architecture.qk_norm,
            tie_embeddings=bool(values["tie_word_embeddings"]),
            init_std=float(values.get("initializer_range") or 0.02),
        )
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ConvertError(f"{path}: describes no model ({key} is {problem['input']!r}); repair it") from None
    return SourceModel(
        architecture=architecture,
        model=model,
        activation=activation,
        output_bias=architecture.bias == "key" and bias,
        mlp_bias=bool(values.get("mlp_bias")),
        max_position_embeddings=values["max_position_embeddings"],
        down_by_neuron=down_by_neuron,
        published=published,
    )


def _with_defaults(path: Path, model_type: str, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with what it leaves out, as transformers fills it in."""
    from transformers import CONFIG_MAPPING

    known = {
        key: value
        for key, value in raw.items()
        if key not in ("model_type", "architectures", "auto_map") and not key.startswith("sparsity_")
    }
    try:
        return dict(CONFIG_MAPPING[model_type].from_dict(known).to_dict())
    except Exception as error:  # transformers raises many types for a value that it does not like
        reason = " ".join(str(error).split())
        raise ConvertError(f"{path}: transformers refuses it ({reason}); repair the named key") from None


def _refuse_others(path: Path, values: dict[str, Any]) -> None:
    layers = values.get("layer_types") or []
    of_mistral = values["model_type"] == "mistral" and values.get("sliding_window") is not None
    if of_mistral or values.get("use_sliding_window") or any(kind != "full_attention" for kind in layers):
        key = "sliding_window" if of_mistral else "use_sliding_window"
        raise ConvertError(
            f"{path}: sliding-window attention ({key}) is not supported; every layer here attends to all earlier tokens"
        )
    if values.get("quantization_config"):
        raise ConvertError(f"{path}: the weights are quantised (quantization_config); give the unquantised model")


def _rotary(path: Path, values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling. transformers 5 keeps them in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    found: dict[str, Any] = dict(values.get("rope_scaling") or {})
    with contextlib.suppress(TypeError):
        found.update(values.get("rope_parameters") or {})
    theta = float(found.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = found.get("rope_type") or found.get("type") or "default"
    if float(found.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConvertError(f"{path}: partial_rotary_factor is not supported; every channel of a head is rotated here")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConvertError(f"{path}: rope_scaling of type {kind!r} is not supported; supported are default and llama3")
    return theta, RopeScaling(
        factor=float(found["factor"]),
        low_freq_factor=float(found["low_freq_factor"]),
        high_freq_factor=float(found["high_freq_factor"]),
        original_max_position_embeddings=int(found["original_max_position_embeddings"]),
    )
