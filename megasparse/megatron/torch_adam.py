"""Lets Megatron-Core train with torch's AdamW, and load a checkpoint into it.

Megatron takes the Adam of Transformer Engine or Apex wherever one is installed, also where there is no GPU to run it.
Without them it uses torch's AdamW, whose state has a `step` for every parameter. Three places of 0.16's distributed
optimizer overlook that. It asks for the step before there is any state. Loading, it gives all
parameters one and the same tensor as their step, which every parameter's update then advances. And loading the
`fully_reshardable` format it looks for a `step` among each parameter's loaded tensors, where it is not.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron import core
from megatron.core import utils
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer import optimizer as mixed_precision
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def choose_torch_adam_without_cuda() -> None:
    """Have Megatron take torch's AdamW and copies where there is no GPU, whatever is installed.

    Call it before making optimizers. It sets what Megatron itself sets where neither package is installed.
    """
    if torch.cuda.is_available():
        return
    core.optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    mixed_precision.multi_tensor_applier = utils.local_multi_tensor_applier
    mixed_precision.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def prepare_torch_adam(optimizer: Any) -> None:
    """Make a new optimizer of `get_megatron_optimizer` ready to be loaded into. Nothing where AdamW is not torch's."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {  # as torch's own first step makes it
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if isinstance(part, DistributedOptimizer):
            _keep_steps(part)


def _keep_steps(optimizer: DistributedOptimizer) -> None:
    set_states = optimizer._set_main_param_and_optimizer_states

    def set_with_step(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main = optimizer.optimizer.param_groups[group]["params"][order]
        state = optimizer.optimizer.state[main]
        state["step"] = state["step"].clone()
        set_states(model_param, {"step": state["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = set_with_step
