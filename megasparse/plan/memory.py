"""Memory of one GPU, an estimate.

Weights, gradients and optimizer state are exact up to padding; activations follow Korthikanti et al. (arXiv 2205.05198)
with a fused attention (no score matrix) and the buffers that the MLP here saves; `OVERHEAD`, `COMMUNICATORS` and
`PENDING_TRANSFERS` stand for the CUDA context, NCCL and the allocator's slack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megasparse.config import Config
from megasparse.plan.in_flight import InFlight, in_flight
from megasparse.plan.parameters import count_parameters, parameters_on_stage

OVERHEAD = 3 << 30
"""Bytes of a GPU that no tensor of ours holds: CUDA context, libraries, what the allocator keeps. One H200 with
Transformer Engine: 2.8 to 3.3 GiB (tools/benchmark_pretrain.py)."""
COMMUNICATORS = {"data": 1 << 29, "tensor": 1 << 30, "context": 1 << 30, "pipeline": 1 << 31}
"""Bytes more for each kind of parallelism: NCCL's buffers of the process groups that it uses. Two H200s: DP 0.5 GiB,
TP 1.0, CP 1.1, PP 1.8, interleaved 2.2. (All of Megatron's groups set up at once: 7.1; training/distributed.py.)"""
PENDING_TRANSFERS = 34
"""Hidden states that an interleaved pipeline has received and done with, but whose memory PyTorch does not give out
again before the GPU, which the host is far ahead of, is done with them. Two H200s, PP 2, two chunks: 2.2 GiB."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one GPU of one pipeline stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations_dense: int
    """All MLPs on the dense path: how every run with `sparsity.path: auto` starts."""
    activations_sparse: int
    """All MLPs on the sparse path at the assumed L0."""
    temporaries_dense: int
    """Largest temporaries: of head and loss on the last stage, or of one layer's backward."""
    temporaries_sparse: int
    overhead: int
    """What no tensor of ours holds."""

    def total(self, sparse: bool) -> int:
        passing = self.activations_dense + self.temporaries_dense
        if sparse:
            passing = self.activations_sparse + self.temporaries_sparse
        return self.weights + self.gradients + self.optimizer + passing + self.overhead


def stage_memory(
    cfg: Config, stage: int, world_size: int, micro_batches: int, mlp_dense: int, mlp_sparse: int
) -> StageMemory:
    """`micro_batches`: a step's, per data-parallel rank. `mlp_dense`, `mlp_sparse`: `mlp_saved` on either path."""
    parallel, bf16 = cfg.parallel, cfg.training.precision == "bf16"
    count = parameters_on_stage(cfg, stage)
    shards = parallel.data_parallel_size(world_size) * parallel.context if parallel.distributed_optimizer else 1
    element = 2 if bf16 else 4
    state = 12 if bf16 else 8  # Adam's two fp32 moments; for bf16 weights an fp32 master copy
    first, last = stage == 0, stage == parallel.pipeline - 1

    flight = in_flight(cfg, stage, micro_batches)

    def activations(mlp: int) -> int:
        total = flight.at_once * cfg.chunk_layers * _layer_saved(cfg, mlp)
        if cfg.training.recompute == "full":  # the layer being recomputed holds everything at once
            total += _layer_everything(cfg, mlp)
        if first:
            total += flight.of_chunk[0] * _residual(cfg)  # output of the embedding
        if cfg.training.cuda_graphs:
            total += _graphs(cfg, flight)
        return math.ceil(total)

    return StageMemory(
        stage=stage,
        weights=count * element + _fp8_weights(cfg),
        gradients=count * (4 if parallel.grad_reduce_in_fp32 else element),
        optimizer=-(-count * state // shards),
        activations_dense=activations(mlp_dense),
        activations_sparse=activations(mlp_sparse),
        temporaries_dense=_temporaries(cfg, last, sparse=False),
        temporaries_sparse=_temporaries(cfg, last, sparse=True),
        overhead=_overhead(cfg, world_size),
    )


def _overhead(cfg: Config, world_size: int) -> int:
    parallel = cfg.parallel
    data = parallel.data_parallel_size(world_size)
    sizes = {"data": data, "tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline}
    pending = PENDING_TRANSFERS * _residual(cfg) if parallel.chunks > 1 else 0
    return OVERHEAD + pending + sum(COMMUNICATORS[kind] for kind, size in sizes.items() if size > 1)


def _graphs(cfg: Config, flight: InFlight) -> float:
    """Bytes that CUDA graphs keep besides what the attention part of the micro-batches in flight saves.

    Each chunk has graphs for as many micro-batches as it ever has in flight, which chunks do not have at the same time.
    Their forwards have room for what one layer needs for itself, and 8-bit weights of their own; all backwards have
    such room once. Measured, in hidden states of a micro-batch, on 0.5B (alone, TP 2, PP 2 with and without
    interleaving) and on layers of 13B and 70B (TP 2); on 0.5B under CP 2 what that adds, in keys and values.
    """
    captured, tensor = sum(flight.of_chunk), cfg.parallel.tensor
    idle = (captured - flight.at_once) * cfg.chunk_layers * _attention_part(cfg)
    states = captured * (1.5 + 2 / tensor) + 10.5 / tensor
    weights = count_parameters(cfg).attention_per_layer // tensor  # their gradients
    temporaries = (states * _tokens(cfg) * cfg.model.hidden_size + weights) * _element(cfg)
    if cfg.parallel.context > 1:
        temporaries += (2 * captured + 4) * _keys_and_values(cfg)
    return idle + temporaries + captured / len(flight.of_chunk) * _fp8_weights(cfg)


def _fp8_weights(cfg: Config) -> int:
    """Bytes of the projections' 8-bit copies on one rank, which Transformer Engine keeps from one step to the next: as
    they are, and transposed for the backward."""
    if cfg.training.fp8 == "off":
        return 0
    model, parallel = cfg.model, cfg.parallel
    rows = 2 * (model.num_attention_heads + model.query_groups) * model.head_width
    return 2 * model.num_layers // parallel.pipeline * rows * model.hidden_size // parallel.tensor


def _tokens(cfg: Config) -> int:
    """Tokens of a micro-batch on one rank, outside sequence parallelism."""
    return cfg.training.micro_batch_size * cfg.data.sequence_length // cfg.parallel.context


def _element(cfg: Config) -> int:
    return 2 if cfg.training.precision == "bf16" else 4


def _residual(cfg: Config) -> int:
    """Bytes of one residual-stream tensor of a micro-batch."""
    share = cfg.parallel.tensor if cfg.parallel.sequence_parallel else 1
    return _tokens(cfg) // share * cfg.model.hidden_size * _element(cfg)


def mlp_saved(cfg: Config, l0: float | None) -> int:
    """Bytes one MLP saves for its backward, per micro-batch, besides its input; `l0` None: the dense path.

    Not a formula: the operation runs on tensors without storage, and what autograd keeps is counted.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megasparse.mlp import sparse_mlp
    from megasparse.mlp.dispatch import LayerRouter

    tokens, hidden, width = _tokens(cfg), cfg.model.hidden_size, cfg.model.ffn_hidden_size // cfg.parallel.tensor
    capacity = None
    if l0 is not None:
        router = LayerRouter("sparse", width, hidden)
        router.update(l0 / cfg.parallel.tensor, 1.0, tokens=tokens)
        capacity = router.capacity(tokens)
    kept: list[int] = []
    dtype = torch.bfloat16 if cfg.training.precision == "bf16" else torch.float32
    rows = (2 if cfg.model.gated else 1) * width
    with FakeTensorMode():
        inputs = [torch.empty(size, hidden, dtype=dtype, requires_grad=True) for size in (tokens, rows, width)]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes), lambda _: inputs[0]):
            sparse_mlp(*inputs, path="dense" if l0 is None else "sparse", capacity=capacity)
        return sum(kept) - sum(tensor.nbytes for tensor in inputs)


def _keys_and_values(cfg: Config) -> int:
    """Bytes of the keys and values of one layer and micro-batch on one rank."""
    model = cfg.model
    return 2 * _tokens(cfg) * model.query_groups * model.head_width // cfg.parallel.tensor * _element(cfg)


def _attention_saved(cfg: Config) -> int:
    """Queries, keys, values, the fused attention's output and its log-sum-exp, of one layer and micro-batch."""
    model, tensor = cfg.model, cfg.parallel.tensor
    widths = 2 * (model.num_attention_heads + model.query_groups) * model.head_width
    saved = _tokens(cfg) * (widths * _element(cfg) + 4 * model.num_attention_heads) // tensor
    if cfg.training.fp8 != "off" and cfg.training.fp8_recipe == "delayed":
        # The output projection keeps a quantised copy of its input; under the other recipes Megatron-Core lets it
        # keep the attention's own output.
        saved += _tokens(cfg) * model.num_attention_heads * model.head_width // tensor
    return saved


def _projection_input(cfg: Config) -> int:
    """Bytes of the normalised input that the projection of queries, keys and values keeps: 8 bits each under fp8."""
    return _residual(cfg) if cfg.training.fp8 == "off" else _residual(cfg) // 2


def _attention_part(cfg: Config) -> int:
    """Bytes that one layer saves up to the sum of attention's output and the residual stream, both included."""
    return 2 * _residual(cfg) + _projection_input(cfg) + _attention_saved(cfg)


def _layer_everything(cfg: Config, mlp: int) -> int:
    """Bytes one layer saves without recomputation."""
    dropout = 2 * _residual(cfg) // _element(cfg) if cfg.model.hidden_dropout else 0
    return _attention_part(cfg) + _residual(cfg) + mlp + dropout  # the residual: output of the norm before the MLP


def _layer_saved(cfg: Config, mlp: int) -> float:
    """Bytes one layer keeps from its forward to its backward, mean over the layers of a stage."""
    training = cfg.training
    everything = _layer_everything(cfg, mlp)
    if training.recompute == "full":
        share = (training.recompute_layers or cfg.chunk_layers) / cfg.chunk_layers
        return share * _residual(cfg) + (1 - share) * everything
    if training.recompute == "selective":
        if "mlp" in training.recompute_modules:
            everything -= mlp
        if "layernorm" in training.recompute_modules:
            # Transformer Engine fuses the norm before the attention into the projection, which keeps its output.
            everything -= (2 if cfg.model.implementation == "local" else 1) * _residual(cfg)
        if "core_attn" in training.recompute_modules:
            everything -= 4 * _tokens(cfg) * cfg.model.num_attention_heads // cfg.parallel.tensor
    return everything


def _temporaries(cfg: Config, last: bool, sparse: bool) -> int:
    """Largest temporaries, bytes.

    One MLP's backward: its gradients by neuron and by token, and under sequence parallelism its input, gathered again;
    the sparse path has buffers for the worst case, in which every neuron fires (csrc/README.md). On the last stage the
    logits, which their gradient overwrites, with the gradients of output layer and hidden states beside them.
    """
    tokens, tensor, element = _tokens(cfg), cfg.parallel.tensor, _element(cfg)
    buffers = (6 if sparse else 3) if cfg.model.gated else (4 if sparse else 2)
    width, hidden = cfg.model.ffn_hidden_size // tensor, cfg.model.hidden_size
    by_token = 3 if cfg.parallel.sequence_parallel else 2
    backward = tokens * (buffers * width + by_token * hidden) * element
    rows = cfg.padded_vocab_size() // tensor
    head = (tokens * (rows + hidden) + rows * hidden) * element if last else 0
    return max(backward, head)
