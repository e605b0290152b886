"""Rules of a model and its layout."""

from __future__ import annotations

from collections.abc import Iterator

from megasparse.config.errors import Problem
from megasparse.config.schema import Config


def near_multiple(value: int, multiple: int) -> int:
    """The multiple nearest to `value`, and at least one."""
    return max(1, round(value / multiple)) * multiple


def _attention(cfg: Config) -> Iterator[Problem]:
    model, tensor = cfg.model, cfg.parallel.tensor
    heads, groups = model.num_attention_heads, model.query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        yield Problem(
            "model.hidden_size",
            f"not a multiple of model.num_attention_heads = {heads}",
            f"set {near_multiple(model.hidden_size, heads)}, or set model.kv_channels",
            model.hidden_size,
        )
    if heads % groups:
        yield Problem(
            "model.num_query_groups",
            f"does not divide model.num_attention_heads = {heads}",
            "set a divisor of the number of heads",
            groups,
        )
    if model.head_width % 2:
        yield Problem(
            "model.kv_channels",
            "rotary embeddings need an even head width",
            "set an even width",
            model.head_width,
        )
    if heads % tensor:
        yield Problem(
            "parallel.tensor",
            f"does not divide model.num_attention_heads = {heads}",
            "set a divisor of the number of heads",
            tensor,
        )
    elif groups % tensor:
        yield Problem(
            "parallel.tensor",
            f"does not divide model.num_query_groups = {groups}",
            "set a divisor of the number of query groups",
            tensor,
        )


def _feed_forward(cfg: Config) -> Iterator[Problem]:
    width, tensor = cfg.model.ffn_hidden_size, cfg.parallel.tensor
    if width % tensor:
        yield Problem(
            "model.ffn_hidden_size",
            f"not a multiple of parallel.tensor = {tensor}",
            f"set {near_multiple(width, tensor)}",
            width,
        )


def _rope(cfg: Config) -> Iterator[Problem]:
    scaling = cfg.model.rope_scaling
    if scaling and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield Problem(
            "model.rope_scaling.high_freq_factor",
            f"not above low_freq_factor = {scaling.low_freq_factor}",
            "Llama 3.1 has 4.0 and 1.0",
            scaling.high_freq_factor,
        )


def _pipeline(cfg: Config) -> Iterator[Problem]:
    parallel, layers = cfg.parallel, cfg.model.num_layers
    chunks = parallel.pipeline * parallel.chunks
    if parallel.chunks > 1 and parallel.pipeline == 1:
        yield Problem(
            "parallel.virtual_pipeline",
            "model chunks are interleaved between stages, and parallel.pipeline is 1",
            "set parallel.pipeline > 1 or leave virtual_pipeline out",
            parallel.virtual_pipeline,
        )
    elif layers % chunks:
        product = f"{parallel.pipeline} x {parallel.chunks} = {chunks}"
        yield Problem(
            "model.num_layers",
            f"not a multiple of parallel.pipeline x virtual_pipeline = {product}",
            f"set {near_multiple(layers, chunks)} layers or other pipeline sizes",
            layers,
        )


def _sequence(cfg: Config) -> Iterator[Problem]:
    parallel, length = cfg.parallel, cfg.data.sequence_length
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield Problem(
            "parallel.sequence_parallel",
            "shards activations over the tensor-parallel ranks, and parallel.tensor is 1",
            "set parallel.tensor > 1 or sequence_parallel: false",
            True,
        )
    share = 2 * parallel.context if parallel.context > 1 else 1
    if length % share:
        yield Problem(
            "data.sequence_length",
            f"context parallelism gives each of {parallel.context} ranks two chunks: not a multiple of {share}",
            f"set {near_multiple(length, share)}",
            length,
        )
    elif parallel.sequence_parallel and (length // parallel.context) % parallel.tensor:
        product = parallel.context * parallel.tensor
        yield Problem(
            "data.sequence_length",
            "sequence parallelism needs sequence_length / parallel.context to be a "
            f"multiple of parallel.tensor = {parallel.tensor}",
            f"set a multiple of {product}",
            length,
        )
    limit = cfg.model.max_position_embeddings
    if limit is not None and length > limit:
        yield Problem(
            "data.sequence_length",
            f"longer than model.max_position_embeddings = {limit}",
            f"set at most {limit} or raise max_position_embeddings",
            length,
        )


def _documents(cfg: Config) -> Iterator[Problem]:
    if cfg.data.reset_attention_mask and cfg.parallel.context > 1:
        yield Problem(
            "data.reset_attention_mask",
            "not available with context parallelism",
            "set parallel.context: 1 or reset_attention_mask: false",
            True,
        )


def _overlap(cfg: Config) -> Iterator[Problem]:
    parallel = cfg.parallel
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        yield Problem(
            "parallel.overlap_param_gather",
            "only the distributed optimizer gathers parameters",
            "set parallel.distributed_optimizer: true",
            True,
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield Problem(
            "parallel.overlap_param_gather",
            "needs the gradient reduction overlapped too",
            "set parallel.overlap_grad_reduce: true",
            True,
        )


RULES = (_attention, _feed_forward, _rope, _pipeline, _sequence, _documents, _overlap)
