"""AdamW by Megatron-Core: parameter groups, distributed optimizer, clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megasparse.config import Config
from megasparse.megatron.grad_norm import prepare_grad_norm
from megasparse.megatron.optimizer_shards import save_own_shards
from megasparse.megatron.torch_adam import choose_torch_adam_without_cuda, prepare_torch_adam


def wrap_in_ddp(cfg: Config, chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """Wraps each model chunk in Megatron's DistributedDataParallel, which owns the gradient buffers."""
    parallel = cfg.parallel
    # One rank alone has nobody to wait for, and its hooks on every module and parameter take the host's time.
    several = parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce and several,
        overlap_param_gather=parallel.overlap_param_gather and several,
        use_distributed_optimizer=parallel.distributed_optimizer,
        # Non-finite gradients are looked for once a step, in the global norm: see train_step.
        check_for_nan_in_grad=False,
    )
    # Nothing is broadcast: every parameter is made from (seed, name), equal on all data-parallel ranks.
    return [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp,
            module=chunk,
            # With interleaving only the first chunk's buckets can overlap with its own backward.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]


def ddp_config(model: Sequence[torch.nn.Module]) -> DistributedDataParallelConfig:
    """How `wrap_in_ddp` wrapped these chunks."""
    return cast(DistributedDataParallelConfig, model[0].ddp_config)


def gather_parameters(model: Sequence[torch.nn.Module]) -> None:
    """Gives every rank the whole of the parameters. Collective.

    With `overlap_param_gather` a rank has updated its own share alone until the next forward pass of the training.
    """
    for chunk in model:
        if getattr(chunk, "use_forward_hook", False):
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


def build_optimizer(cfg: Config, model: Sequence[torch.nn.Module]) -> Any:
    """Megatron's optimizer over the DDP-wrapped chunks. Collective: all ranks call it together."""
    section = cfg.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=cfg.training.precision == "bf16",
        params_dtype=torch.bfloat16 if cfg.training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_param_gather=ddp_config(model).overlap_param_gather,
    )
    overrides = {}
    if section.weight_decay_exclude:
        excluded = _excluded_from_weight_decay(section.weight_decay_exclude)
        key = ParamKey(with_name_predicate=ParamWithNamePredicate(name="no_weight_decay", fn=excluded))
        overrides[key] = {"wd_mult": 0.0}
    choose_torch_adam_without_cuda()
    prepare_grad_norm()
    optimizer = get_megatron_optimizer(config, list(model), config_overrides=overrides)
    prepare_torch_adam(optimizer)
    save_own_shards(optimizer)
    return optimizer


def apply_adam_settings(cfg: Config, optimizer: Any) -> None:
    """Betas and epsilon as configured: loading a state gives every parameter group those that it was saved with."""
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = cfg.optimizer.betas, cfg.optimizer.eps


def _excluded_from_weight_decay(kinds: Sequence[str]) -> Callable[[torch.nn.Parameter, str], bool]:
    """Which parameters get no weight decay. The two copies of a tied embedding under PP must agree."""

    def excluded(parameter: torch.nn.Parameter, name: str) -> bool:
        bias = name.endswith("bias")
        norm = parameter.dim() == 1 and "norm" in name
        embedding = "word_embeddings" in name or getattr(parameter, "shared_embedding", False)
        return (
            ("bias" in kinds and bias and not norm)
            or ("norm" in kinds and norm)
            or ("embedding" in kinds and embedding)
        )

    return excluded


def gradient_norm(optimizer: Any) -> float:
    """L2 norm of the job's whole gradient, on every rank the same. Waits for the GPU."""
    optimizer.prepare_grads()
    return float(_only_optimizer(optimizer).get_grad_norm())


def clip_gradients(optimizer: Any, norm: float) -> None:
    """Scales the gradients, whose norm is `norm`, to the configured norm if theirs is larger."""
    inner = _only_optimizer(optimizer)
    if 0 < inner.config.clip_grad < norm + 1e-6:
        torch.nn.utils.clip_grads_with_norm_(inner.get_parameters(), inner.config.clip_grad, torch.tensor(norm))


def _only_optimizer(optimizer: Any) -> Any:
    """Megatron chains one optimizer for dense and one for expert parameters; here there are no experts."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(chained) != 1:
        raise ValueError(f"one optimizer expected, found {len(chained)}: are there expert parameters?")
    return chained[0]


def main_parameter(optimizer: Any, parameter: torch.nn.Parameter) -> tuple[torch.Tensor | None, int, int]:
    """The fp32 tensor that the optimizer updates for `parameter`, and which part of it this rank holds.

    Returns:
        (tensor, start, end): `tensor` holds elements [start, end) of the flattened parameter (all of them without
        the distributed optimizer, then in the parameter's shape); None where this rank holds no part.
    """
    inner = _only_optimizer(optimizer)
    if hasattr(inner, "model_param_gbuf_map"):
        if parameter not in inner.model_param_gbuf_map:
            return None, 0, 0
        gbuf, dtype, bucket = inner.model_param_gbuf_map[parameter]
        ranges = inner.gbuf_ranges[gbuf][dtype][bucket]["param_map"].get(parameter)
        if ranges is None:
            return None, 0, 0
        group, order = inner.model_param_group_index_map[parameter]
        tensor = inner.optimizer.param_groups[group]["params"][order]
        return tensor, ranges["param"].start, ranges["param"].end
    main = getattr(parameter, "main_param", None)
    return (main if main is not None else parameter), 0, parameter.numel()


def adam_moments(optimizer: Any, main: torch.Tensor) -> list[torch.Tensor]:
    """First and second moment of a main parameter; empty before the first update."""
    state = _only_optimizer(optimizer).optimizer.state.get(main, {})
    return [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]


def not_finite_gradients(model: Sequence[torch.nn.Module]) -> list[str]:
    """`rank: parameter` of some gradients that are not finite, of all ranks. Collective; for messages only."""
    own = []
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                own.append(f"rank {dist.get_rank()}: {name}")
    everybody: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, own[:3])
    return [text for names in everybody for text in names][:12]
