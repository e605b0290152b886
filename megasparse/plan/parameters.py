"""How many parameters a model has, in all and on each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config import Config, ConfigError


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of the whole model, padded vocabulary included; tied embeddings count once."""

    embedding: int
    attention_per_layer: int
    mlp_per_layer: int
    norms_per_layer: int
    layers: int
    final_norm: int
    output: int
    """0 where it is tied to the embedding."""

    @property
    def per_layer(self) -> int:
        return self.attention_per_layer + self.mlp_per_layer + self.norms_per_layer

    @property
    def total(self) -> int:
        return self.embedding + self.layers * self.per_layer + self.final_norm + self.output


def count_parameters(cfg: Config) -> Parameters:
    """Exact counts, as the model is built. Needs the vocabulary size."""
    model = cfg.model
    norm = model.hidden_size * (1 if model.normalization == "rmsnorm" else 2)
    queries = model.num_attention_heads * model.head_width
    qkv = queries + 2 * model.query_groups * model.head_width
    qk_norm = 2 * model.head_width * (1 if model.normalization == "rmsnorm" else 2)
    vocabulary = cfg.padded_vocab_size() * model.hidden_size
    return Parameters(
        embedding=vocabulary,
        attention_per_layer=model.hidden_size * (qkv + queries) + qkv * model.qkv_bias + qk_norm * model.qk_norm,
        mlp_per_layer=(3 if model.gated else 2) * model.hidden_size * model.ffn_hidden_size,
        norms_per_layer=2 * norm,
        layers=model.num_layers,
        final_norm=norm,
        output=0 if model.tie_embeddings else vocabulary,
    )


def parameters_on_stage(cfg: Config, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds: tensor-parallel shards, and whole norms."""
    parameters, parallel, tensor = count_parameters(cfg), cfg.parallel, cfg.parallel.tensor
    model = cfg.model
    queries = model.num_attention_heads * model.head_width
    whole = parameters.attention_per_layer - model.hidden_size * 2 * (queries + model.query_groups * model.head_width)
    bias = (queries + 2 * model.query_groups * model.head_width) * model.qkv_bias
    whole -= bias  # what remains are the norms of queries and keys, which every rank holds
    sharded = parameters.attention_per_layer - whole + parameters.mlp_per_layer
    layers = model.num_layers // parallel.pipeline
    count = layers * (sharded // tensor + whole + parameters.norms_per_layer)
    if stage == 0:
        count += parameters.embedding // tensor
    if stage == parallel.pipeline - 1:
        count += parameters.final_norm
        # A tied output on another stage than the embedding is a copy, kept equal by an all-reduce.
        if not model.tie_embeddings or parallel.pipeline > 1:
            count += parameters.embedding // tensor
    return count


def checkpoint_bytes(cfg: Config) -> int:
    """Of one checkpoint: weights, fp32 master weights (bf16 only) and two Adam moments; 0 where the size is unknown."""
    try:
        return count_parameters(cfg).total * (14 if cfg.training.precision == "bf16" else 12)
    except ConfigError:  # no vocabulary size, which is told elsewhere
        return 0
