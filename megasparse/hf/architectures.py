"""Which stock transformers architecture a model is, and the names of its tensors there.

All of them are decoders with RMSNorm before attention and MLP, rotary embeddings in the half-split ("NeoX") order
that Megatron uses too, and no bias in the MLP. They differ in gating, biases of the attention, and norms of
queries and keys; with `hidden_act: relu` each is one of the models that this package trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megasparse.config import ModelConfig
from megasparse.hf.errors import ConvertError


@dataclass(frozen=True)
class Architecture:
    """One model type of transformers.

    `bias`: biases of the attention: never, always of q, k, v, or (config key `attention_bias`) of q, k, v and o.
    """

    model_type: str
    class_name: str
    gated: bool = True
    qk_norm: bool = False
    bias: Literal["never", "qkv", "key"] = "key"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"


ARCHITECTURES = {
    item.model_type: item
    for item in (
        Architecture("llama", "LlamaForCausalLM"),
        Architecture("mistral", "MistralForCausalLM", bias="never"),  # read alone: Llama, where no window is set
        Architecture("qwen2", "Qwen2ForCausalLM", bias="qkv"),
        Architecture("qwen3", "Qwen3ForCausalLM", qk_norm=True),
        Architecture("arcee", "ArceeForCausalLM", gated=False),
        Architecture(
            "apertus",
            "ApertusForCausalLM",
            gated=False,
            qk_norm=True,
            attention_norm="attention_layernorm",
            mlp_norm="feedforward_layernorm",
        ),
    )
}


def architecture_of(model: ModelConfig, qwen2_tokenizer: bool = True) -> Architecture:
    """The stock architecture that computes what the model computes.

    `qwen2_tokenizer`: the model's tokenizer is that of Qwen2 models. They have no other in transformers, so without it
    their place is taken by Llama with biases, which differs in a bias of the attention's output (zeros).

    Raises:
        ConvertError: there is none.
    """
    if model.normalization != "rmsnorm":
        raise ConvertError(
            f"model.normalization is {model.normalization}: no architecture of transformers that is supported here has "
            "it; train with rmsnorm to export"
        )
    if model.qk_norm:
        name = "qwen3" if model.gated else "apertus"
    elif not model.gated:
        name = "arcee"
    else:
        name = "qwen2" if model.qkv_bias and qwen2_tokenizer else "llama"
    if name in ("llama", "arcee") and model.hidden_size % model.num_attention_heads:
        raise ConvertError(
            f"transformers' {ARCHITECTURES[name].class_name} needs hidden_size ({model.hidden_size}) to be a "
            f"multiple of num_attention_heads ({model.num_attention_heads}); a model with qk_norm can be exported, and "
            "a gated one with qkv_bias whose tokenizer is Qwen2's, or is left out (--no-tokenizer)"
        )
    return ARCHITECTURES[name]
