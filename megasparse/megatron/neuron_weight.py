"""The two weights of the sparse MLP, checkpointed exactly as Megatron's `linear_fc1` and `linear_fc2`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)

BY_NEURON = "weight_by_neuron"
"""Key, in the state dict that a distributed checkpoint is loaded into, of a `linear_fc2` weight stored by neuron.

It never reaches a file. It tells `load_state_dict` that the tensor needs no transposition, which its shape alone
cannot tell where it is square.
"""


class TransposedWeightFactory(ShardedTensorFactory):
    """Of a weight [rows, columns] whose one shard in checkpoints is its transpose."""


class NeuronWeight(MegatronModule):
    """Parameter `weight` [rows, hidden_size] on Megatron's current device, rows being of this rank's neurons."""

    save_original_input = True
    """What Megatron, to recompute the norm before it under fp8, asks of `linear_fc1`: that its input is kept for the
    backward itself, not a quantised copy. It always is."""

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        tp_group: torch.distributed.ProcessGroup,
        init_method: Callable[[torch.Tensor], Any],
        stride: int = 1,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(
            torch.empty(rows, config.hidden_size, device=torch.cuda.current_device(), dtype=config.params_dtype)
        )
        if config.perform_initialization:
            _initialize_affine_weight_gpu(self.weight, init_method, partition_dim=0, stride=stride)
        else:
            set_tensor_model_parallel_attributes(self.weight, True, 0, stride)
        self.weight.allreduce = True  # type: ignore[attr-defined]
        self._register_load_state_dict_pre_hook(_default_extra_state)

    def forward(self) -> torch.Tensor:
        """The weight. To be called for it: a hook before it waits, where Megatron's `overlap_param_gather` is on, until
        all of the weight is there."""
        return self.weight

    def get_extra_state(self) -> None:
        """Nothing; Megatron's linear layers save it too, so the checkpoints have the same keys."""
        return None

    def set_extra_state(self, state: Any) -> None:
        """Ignore what Transformer Engine may have saved."""


def _default_extra_state(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.setdefault(f"{prefix}_extra_state", None)


class InWeight(NeuronWeight):
    """`linear_fc1`: gate rows, then up rows [2 H / tp, D]; or [H / tp, D]. As Megatron's own."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As Megatron's dense MLP: gate and up are cut separately, so that any tensor parallelism can load them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.config.gated_linear_unit:
            key = f"{prefix}weight"
            single = metadata.get("singleton_local_shards", False)
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets, single)
        return state


class DownWeight(NeuronWeight):
    """`linear_fc2`, stored transposed: [H / tp, D], one row per neuron. In checkpoints [D, H], as Megatron's own.

    `state_dict` and `load_state_dict` speak Megatron's layout ([D, H / tp]) too.
    """

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As Megatron's dense MLP; a factory transposes the weight, and optimizer states of its shape, both ways."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state = make_sharded_tensors_for_checkpoint({"_extra_state": None}, prefix, None, sharded_offsets, **groups)
        prepended = len(sharded_offsets)
        shard = (prepended + 1, self.tp_group.rank(), self.tp_group.size())

        @torch.no_grad()
        def build(
            key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None
        ) -> ShardedTensor:
            if flattened_range is not None:
                raise ValueError(
                    f"{key}: this weight is stored transposed and cannot be saved as a flattened range; use the "
                    "optimizer checkpoint format 'fully_reshardable' (metadata['distrib_optim_sharding_type'])"
                )
            return ShardedTensor.from_rank_offsets(
                key,
                tensor.t().contiguous(),
                *sharded_offsets,
                shard,
                replica_id=replica_id,
                prepend_axis_num=prepended,
            )

        @torch.no_grad()
        def merge(loaded: torch.Tensor) -> torch.Tensor:
            return loaded.t().contiguous()

        key = f"{prefix}weight"
        replica_id = make_tp_sharded_tensor_for_checkpoint(
            self.weight, key, 0, prepend_offsets=sharded_offsets, **groups
        ).replica_id
        state[f"{prefix}{BY_NEURON}"] = TransposedWeightFactory(key, self.weight, build, merge, replica_id)
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key, by_neuron = f"{prefix}weight", f"{prefix}{BY_NEURON}"
        if by_neuron in state_dict:
            state_dict[key] = state_dict.pop(by_neuron)
        elif key in state_dict:
            state_dict[key] = state_dict[key].t()
        super()._load_from_state_dict(state_dict, prefix, *args)
