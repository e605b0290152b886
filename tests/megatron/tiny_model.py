"""A tiny GPT, trained by Megatron's own machinery, and its weights put together from the ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_batch_on_this_cp_rank

from megasparse.config import Config, parse_config
from megasparse.megatron import build_model, iter_sparse_mlps, layer_spec
from megasparse.megatron.init import global_name

SEQUENCE, BATCH, VOCAB = 16, 4, 96

_ZIGZAG = {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else {}
"""Megatron-Core 0.19 can cut sequences in other ways too."""

Arrays = dict[str, np.ndarray]


def make_config(**overrides: Any) -> Config:
    """The tiny GPT; `overrides` are `section__key=value`."""
    raw: dict[str, Any] = {
        "model": {
            "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
            "vocab_size": VOCAB, "make_vocab_size_divisible_by": 8, "init_std": 0.2,
        },
        "sparsity": {"path": "dense"},
        "data": {"sequence_length": SEQUENCE},
        "parallel": {},
        "training": {"global_batch_size": BATCH, "micro_batch_size": 1, "steps": 4, "precision": "fp32"},
    }  # fmt: skip
    for name, value in overrides.items():
        section, key = name.split("__")
        raw[section][key] = value
    return parse_config(raw)


def dense_mlp() -> ModuleSpec:
    """Megatron's own dense MLP."""
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )


def start(cfg: Config) -> None:
    parallel = cfg.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
    )
    model_parallel_cuda_manual_seed(cfg.training.seed, force_reset_rng=True)
    size = torch.distributed.get_world_size() // parallel.model_size
    init_num_microbatches_calculator(
        0, None, cfg.training.global_batch_size, cfg.training.micro_batch_size, size, False
    )


def batch(cfg: Config, step: int, masked: bool) -> dict[str, torch.Tensor]:
    """The whole global batch of a step: the same on every rank, whatever the layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (cfg.training.global_batch_size, SEQUENCE)
    text = torch.randint(VOCAB, (shape[0], SEQUENCE + 1), generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.7 if masked else torch.ones(shape, dtype=torch.bool)
    mask[0, 0] = True
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask.float(),
        "position_ids": torch.arange(SEQUENCE).expand(shape).contiguous(),
    }


def document_mask() -> torch.Tensor:
    """bool [SEQUENCE, SEQUENCE], True where a token must not look: ahead, or into another document."""
    document = torch.tensor([0] * 5 + [1] * 7 + [2] * (SEQUENCE - 12))
    ahead = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    return ahead | (document[:, None] != document[None, :])


class Model:
    """Chunks wrapped for data parallelism, as Megatron trains them."""

    def __init__(
        self,
        cfg: Config,
        *,
        dense: bool = False,
        coeff: float | list[float] = 0.0,
        per_token: bool = True,
        overlap: bool = False,
        gather: bool = False,
        loss_scale: float = 1.0,
        pass_mask: bool = True,
    ) -> None:
        self.cfg = cfg
        self.pass_mask = pass_mask
        self.chunks = build_model(cfg, layer=layer_spec("local", mlp=dense_mlp()) if dense else None)
        self.config = self.chunks[0].config
        self.config.calculate_per_token_loss = per_token
        self.config.finalize_model_grads_func = finalize_model_grads
        if loss_scale != 1.0:
            self.config.grad_scale_func = lambda loss: loss * loss_scale
        for mlp in iter_sparse_mlps(self.chunks):
            mlp.l1_coeff.fill_(coeff if isinstance(coeff, float) else coeff[mlp.layer_index])
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=gather,
            use_distributed_optimizer=cfg.parallel.distributed_optimizer,
            bucket_size=1 if gather else None,  # every parameter has a bucket of its own, as large ones do
        )
        self.ddp = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.chunks)
        ]
        if overlap:
            self.config.no_sync_func = [chunk.no_sync for chunk in self.ddp]
            self.config.grad_sync_func = [chunk.start_grad_sync for chunk in self.ddp]
            if len(self.ddp) == 1:
                self.config.no_sync_func = self.config.no_sync_func[0]
                self.config.grad_sync_func = self.config.grad_sync_func[0]

    def _micro_batches(self, whole: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        per_pass = self.cfg.training.micro_batch_size
        for first in range(rank * per_pass, self.cfg.training.global_batch_size, size * per_pass):
            part = {name: value[first : first + per_pass] for name, value in whole.items()}
            yield get_batch_on_this_cp_rank(part, cp_group=parallel_state.get_context_parallel_group(), **_ZIGZAG)

    def forward_backward(
        self,
        step: int = 0,
        *,
        masked: bool = False,
        cross_entropy: float = 1.0,
        forward_only: bool = False,
        documents: bool = False,
    ) -> float:
        """One global batch; gradients end up in main_grad, reduced. Returns the mean loss on the last stage."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        whole = batch(self.cfg, step, masked)
        if documents:
            whole["attention_mask"] = document_mask().expand(BATCH, 1, SEQUENCE, SEQUENCE)

        def forward_step(iterator: Iterator[dict[str, torch.Tensor]], chunk: torch.nn.Module) -> Any:
            part = next(iterator)
            padding = {"padding_mask": part["loss_mask"] == 0} if masked and self.pass_mask else {}
            losses = chunk(
                part["tokens"], part["position_ids"], part.get("attention_mask"), labels=part["labels"], **padding
            )

            def loss(output: torch.Tensor) -> Any:
                total = (output * part["loss_mask"]).sum()
                count = part["loss_mask"].sum().int()
                return total * cross_entropy, count, {"total": total.detach()}

            return losses, loss

        micro = self.cfg.num_microbatches(torch.distributed.get_world_size())
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[self._micro_batches(whole) for _ in self.ddp],
            model=self.ddp,
            num_microbatches=micro,
            seq_length=SEQUENCE,
            micro_batch_size=self.cfg.training.micro_batch_size,
            forward_only=forward_only,
        )
        total = sum((report["total"].double() for report in reports), torch.zeros((), dtype=torch.float64))
        torch.distributed.all_reduce(total)
        return float(total) / float(whole["loss_mask"].sum()) / self.cfg.parallel.tensor

    def shards(self, gradients: bool = False) -> list[tuple[str, np.ndarray, int, int, int]]:
        """(global name, values, partition dimension or -1, stride, tensor-parallel rank) of every parameter here."""
        found = []
        for chunk in self.chunks:
            first = chunk.decoder.layers[0].layer_number - 1
            for name, parameter in chunk.named_parameters():
                parallel = getattr(parameter, "tensor_model_parallel", False)
                value = parameter.main_grad if gradients else parameter.data
                found.append((
                    global_name(name, first, self.cfg.model.tie_embeddings),
                    value.detach().numpy().copy(),
                    parameter.partition_dim if parallel else -1,
                    max(1, getattr(parameter, "partition_stride", 1)) if parallel else 1,
                    parallel_state.get_tensor_model_parallel_rank(),
                ))  # fmt: skip
        return found


def assemble(ranks: list[list[tuple[str, np.ndarray, int, int, int]]]) -> Arrays:
    """Whole parameters from all ranks' shards, the down projection in Megatron's layout; copies must agree."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    layout: dict[str, tuple[int, int]] = {}
    for shards in ranks:
        for name, values, dim, stride, rank in shards:
            layout[name] = dim, stride
            rank = rank if dim >= 0 else 0
            known = parts.setdefault(name, {}).setdefault(rank, values)
            np.testing.assert_allclose(known, values, rtol=1e-5, atol=1e-7, err_msg=name)
    whole = {}
    for name, shards_by_rank in parts.items():
        dim, stride = layout[name]
        ordered = [shards_by_rank[rank] for rank in sorted(shards_by_rank)]
        if dim < 0:
            whole[name] = ordered[0]
        else:
            cut = [np.split(shard, stride, axis=dim) for shard in ordered]
            whole[name] = np.concatenate([piece[s] for s in range(stride) for piece in cut], axis=dim)
        if name.endswith("linear_fc2.weight") and dim == 0:
            whole[name] = whole[name].T
    return whole
