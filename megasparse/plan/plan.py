"""What a configuration amounts to, before anything starts: parameters, layout, batches, memory per GPU."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config import Config
from megasparse.plan.memory import StageMemory, mlp_saved, stage_memory
from megasparse.plan.parameters import Parameters, count_parameters

ASSUMED_DENSITY = 0.02
"""Share of active neurons assumed for `l1.mode: constant`, where the config names no target."""


@dataclass(frozen=True)
class Plan:
    """Byte counts are per GPU."""

    world_size: int
    data_parallel: int
    micro_batches: int
    """Per data-parallel rank and step."""
    tokens_per_step: int
    tokens_total: int
    layers_per_chunk: int
    bubble: float
    """Time that pipeline stages wait in a step, over the time that they work: (p - 1) / (v m)."""
    parameters: Parameters
    assumed_l0: float
    """Active neurons per token of the whole layer."""
    mlp_saved_dense: int
    """Bytes that one layer's MLP saves for its backward, per micro-batch."""
    mlp_saved_sparse: int
    stages: tuple[StageMemory, ...]

    def worst(self, sparse: bool) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total(sparse))


def assumed_l0(cfg: Config) -> float:
    """Active neurons per token, mean over layers: the target; without one an assumption."""
    l1, width = cfg.sparsity.l1, cfg.model.ffn_hidden_size
    if l1.mode == "target" and l1.target_l0 is not None:
        targets = l1.target_l0 if isinstance(l1.target_l0, tuple) else (l1.target_l0,)
        return sum(targets) / len(targets)
    return width / 2 if l1.mode == "off" else ASSUMED_DENSITY * width


def make_plan(cfg: Config, world_size: int, l0: float | None = None) -> Plan:
    """Arithmetic for a job of `world_size` ranks. Raises ConfigError where the layout does not fit it."""
    cfg.validate(world_size)
    parallel, training = cfg.parallel, cfg.training
    micro_batches = cfg.num_microbatches(world_size)
    tokens_per_step = training.global_batch_size * cfg.data.sequence_length
    l0 = assumed_l0(cfg) if l0 is None else l0
    dense, sparse = mlp_saved(cfg, None), mlp_saved(cfg, l0)
    return Plan(
        world_size=world_size,
        data_parallel=parallel.data_parallel_size(world_size),
        micro_batches=micro_batches,
        tokens_per_step=tokens_per_step,
        tokens_total=tokens_per_step * training.steps,
        layers_per_chunk=cfg.chunk_layers,
        bubble=(parallel.pipeline - 1) / (parallel.chunks * micro_batches),
        parameters=count_parameters(cfg),
        assumed_l0=l0,
        mlp_saved_dense=dense,
        mlp_saved_sparse=sparse,
        stages=tuple(
            stage_memory(cfg, stage, world_size, micro_batches, dense, sparse) for stage in range(parallel.pipeline)
        ),
    )
