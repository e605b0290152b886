"""Every tensor of a model: its key and shape in a Megatron checkpoint, its names in Hugging Face format.

A `Weight` is one Megatron tensor, of one layer or of the whole model, and the Hugging Face tensors that make it up:

- `linear_qkv`: for each group of queries its q heads, its k head, its v head, each of `head_width` rows. In Hugging
  Face format all q heads, all k heads, all v heads. Rows inside a head keep their order: both rotate channel i with
  channel i + head_width / 2.
- `linear_fc1` of a gated MLP: gate rows, then up rows.
- the embedding and the output layer: padded with rows of zeros to a multiple that tensor parallelism divides.
- everything else is the same on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megasparse.config import ModelConfig
from megasparse.hf.architectures import Architecture

Kind = Literal["plain", "qkv", "gated", "vocab", "down"]


@dataclass(frozen=True)
class Weight:
    """One tensor of a Megatron checkpoint and its Hugging Face tensors.

    `shape` is that of the Megatron tensor of one layer. `shard`: the dimension that tensor parallelism cuts (None:
    replicated), `units`: into how many equal parts it may be cut at most.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    names: tuple[str, ...]
    kind: Kind = "plain"
    shard: int | None = None
    units: int = 1

    @property
    def count(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape)

    @property
    def where(self) -> str:
        return self.key if self.layer is None else f"{self.key} of layer {self.layer}"


def weights(model: ModelConfig, architecture: Architecture, padded_vocab_size: int) -> list[Weight]:
    """All weights of the model, in the order of its layers."""
    hidden, width = model.hidden_size, model.head_width
    heads, groups, neurons = model.num_attention_heads, model.query_groups, model.ffn_hidden_size
    vocab = (padded_vocab_size, hidden)
    found = [
        Weight("embedding.word_embeddings.weight", None, vocab, ("model.embed_tokens.weight",), "vocab", 0, vocab[0])
    ]
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}."
        qkv = tuple(f"{at}self_attn.{name}_proj" for name in "qkv")
        rows = (heads + 2 * groups) * width

        def add(
            key: str,
            shape: Sequence[int],
            names: Sequence[str],
            kind: Kind = "plain",
            shard: int | None = None,
            units: int = 1,
            layer: int = layer,
        ) -> None:
            found.append(Weight(f"decoder.layers.{key}", layer, tuple(shape), tuple(names), kind, shard, units))

        add("self_attention.linear_qkv.layer_norm_weight", (hidden,), [f"{at}{architecture.attention_norm}.weight"])
        add("self_attention.linear_qkv.weight", (rows, hidden), [f"{n}.weight" for n in qkv], "qkv", 0, groups)
        if model.qkv_bias:
            add("self_attention.linear_qkv.bias", (rows,), [f"{n}.bias" for n in qkv], "qkv", 0, groups)
        if model.qk_norm:
            add("self_attention.q_layernorm.weight", (width,), [f"{at}self_attn.q_norm.weight"])
            add("self_attention.k_layernorm.weight", (width,), [f"{at}self_attn.k_norm.weight"])
        out = (hidden, heads * width)
        add("self_attention.linear_proj.weight", out, [f"{at}self_attn.o_proj.weight"], "plain", 1, groups)
        add("mlp.linear_fc1.layer_norm_weight", (hidden,), [f"{at}{architecture.mlp_norm}.weight"])
        up = f"{at}mlp.up_proj.weight"
        if model.gated:
            gate = f"{at}mlp.gate_proj.weight"
            add("mlp.linear_fc1.weight", (2 * neurons, hidden), [gate, up], "gated", 0, neurons)
        else:
            add("mlp.linear_fc1.weight", (neurons, hidden), [up], "plain", 0, neurons)
        add("mlp.linear_fc2.weight", (hidden, neurons), [f"{at}mlp.down_proj.weight"], "down", 1, neurons)
    found.append(Weight("decoder.final_layernorm.weight", None, (hidden,), ("model.norm.weight",)))
    if not model.tie_embeddings:
        found.append(Weight("output_layer.weight", None, vocab, ("lm_head.weight",), "vocab", 0, vocab[0]))
    return found


def zero_tensors(model: ModelConfig, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Biases that the architecture has and the model has not, with their shapes: exported as zeros."""
    if architecture.bias == "key" and model.qkv_bias:
        return {f"model.layers.{i}.self_attn.o_proj.bias": (model.hidden_size,) for i in range(model.num_layers)}
    return {}


def hf_shapes(weight: Weight, model: ModelConfig, vocab_size: int) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors `weight.names`."""
    rest = weight.shape[1:]
    if weight.kind == "qkv":
        keys = model.query_groups * model.head_width
        return [(model.num_attention_heads * model.head_width, *rest), (keys, *rest), (keys, *rest)]
    if weight.kind == "gated":
        return [(weight.shape[0] // 2, *rest)] * 2
    if weight.kind == "vocab":
        return [(vocab_size, *rest)]
    return [weight.shape]


def split(weight: Weight, tensor: Tensor, model: ModelConfig, vocab_size: int) -> list[Tensor]:
    """Megatron's tensor -> the Hugging Face tensors `weight.names`. The result may be views."""
    if weight.kind == "qkv":
        groups, width = model.query_groups, model.head_width
        queries = model.num_attention_heads // groups
        grouped = tensor.reshape(groups, queries + 2, width, *tensor.shape[1:])
        parts = grouped.split([queries, 1, 1], dim=1)
        return [part.reshape(-1, *tensor.shape[1:]) for part in parts]
    if weight.kind == "gated":
        return list(tensor.chunk(2))
    if weight.kind == "vocab":
        return [tensor[:vocab_size]]
    return [tensor]


def join(weight: Weight, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """The inverse of `split`; padding of the vocabulary becomes zeros."""
    if weight.kind == "qkv":
        groups, width = model.query_groups, model.head_width
        rest = tensors[0].shape[1:]
        grouped = [tensor.reshape(groups, -1, width, *rest) for tensor in tensors]
        return torch.cat(grouped, dim=1).reshape(weight.shape)
    if weight.kind == "gated":
        return torch.cat(list(tensors))
    if weight.kind == "vocab":
        (tensor,) = tensors
        if tensor.shape[0] == weight.shape[0]:
            return tensor
        padded = tensor.new_zeros(weight.shape)
        padded[: tensor.shape[0]] = tensor
        return padded
    return tensors[0]


def chunks(weight: Weight, most: int = 8) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Blocks (offsets, sizes) in which a weight is stored: at most `most` along the dimension that TP cuts.

    A rank that loads a part of the weight then reads little more than its part. Gate and up are cut separately.
    """
    if weight.shard is None:
        yield (0,) * len(weight.shape), weight.shape
        return
    count = max(n for n in range(1, most + 1) if weight.units % n == 0)
    halves = 2 if weight.kind == "gated" else 1
    size = weight.shape[weight.shard] // (count * halves)
    for index in range(count * halves):
        offsets, sizes = [0] * len(weight.shape), list(weight.shape)
        offsets[weight.shard], sizes[weight.shard] = index * size, size
        yield tuple(offsets), tuple(sizes)
