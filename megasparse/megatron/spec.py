"""Megatron-Core specs: the sparse MLP alone, a transformer layer with it, and the `-` layer of hybrid models.

Ready-made for Megatron-LM, which takes a spec by module and name:

    pretrain_gpt.py --spec megasparse.megatron.spec gpt_layer ...       (docs/megatron-lm.md)
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megasparse.config import ConfigError, Problem
from megasparse.megatron.attention import SDPAttention
from megasparse.megatron.attention_graphs import GraphedLayer
from megasparse.megatron.norm import Norm
from megasparse.megatron.sparse_mlp import SparseMLP
from megasparse.mlp.dispatch import Mode

Implementation = Literal["auto", "local", "te"]

NO_TRANSFORMER_ENGINE = "Transformer Engine, which cannot be used here (not installed, not importable, or no GPU)"


@cache
def have_transformer_engine() -> bool:
    """Whether Transformer Engine is installed, can be imported, and has a GPU to run on."""
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def transformer_engine_problem(key: str, value: Any, why: str, instead: str) -> Problem | None:
    """What is wrong with a setting that asks for Transformer Engine where that cannot be used; None where it can."""
    if have_transformer_engine():
        return None
    fix = f"{instead}, or install it (pip install 'transformer-engine[pytorch]')"
    return Problem(key, f"{why} {NO_TRANSFORMER_ENGINE}", fix, value)


def implementation_problem(implementation: Implementation) -> Problem | None:
    """What keeps an implementation from being used here."""
    if implementation != "te":
        return None
    return transformer_engine_problem("model.implementation", implementation, "is", "set auto or local")


def resolve_implementation(implementation: Implementation) -> Literal["local", "te"]:
    """What "auto" means here. Raises ConfigError where Transformer Engine is asked for and cannot be used."""
    if problem := implementation_problem(implementation):
        raise ConfigError([problem], host_specific=True)
    if implementation == "auto":
        return "te" if have_transformer_engine() else "local"
    return implementation


def _norm(implementation: Implementation) -> Any:
    """The norm that stands alone in a layer: Transformer Engine's, or this package's."""
    if resolve_implementation(implementation) == "local":
        return Norm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


class Layer(GraphedLayer):
    """A layer of `layer_spec`. Refuses what the config asks for and the spec, made before it, lacks.

    Raises:
        ValueError: for queries and keys to be normalised, latent attention, or experts.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        norm = getattr(self.self_attention, "q_layernorm", None)
        if config.qk_layernorm and (norm is None or isinstance(norm, IdentityOp)):
            raise ValueError(
                "the config asks for normalised queries and keys (Megatron-LM: --qk-layernorm), which this layer spec "
                "lacks: save `from megasparse.megatron import layer_spec; layer = layer_spec(qk_norm=True)` as "
                "my_spec.py and pass --spec my_spec layer"
            )
        if config.qk_l2_norm and not isinstance(norm, L2Norm):
            raise ValueError(
                "the config asks for queries and keys of length one (Megatron-LM: --qk-l2-norm), which this layer spec "
                "lacks"
            )
        if config.multi_latent_attention and isinstance(self.self_attention, SelfAttention):
            raise ValueError(
                "the config asks for latent attention (Megatron-LM: --multi-latent-attention), of which this layer "
                "spec has none"
            )
        every = config.moe_layer_freq
        index = self.layer_number - 1
        if config.num_moe_experts and (index % every == 0 if isinstance(every, int) else every[index]):
            raise ValueError(
                f"layer {index} is one with experts by the config (Megatron-LM: --num-experts, --moe-layer-freq), of "
                "which this layer spec has none"
            )


def sparse_mlp_spec(path: Mode = "auto", l1_coeff: float = 0.0, l1_layers: int | None = None) -> ModuleSpec:
    """The sparse MLP alone, for the `mlp` of any layer spec, behind a separate layer norm.

    Arguments are those of `SparseMLP`. Works as Megatron-Core 0.16's ModuleSpec and as 0.19's builder.
    """
    _expect_foreign_mlp()
    return ModuleSpec(module=SparseMLP, params={"path": path, "l1_coeff": l1_coeff, "l1_layers": l1_layers})


def layer_spec(
    implementation: Implementation = "auto",
    *,
    qk_norm: bool = False,
    path: Mode = "auto",
    l1_coeff: float = 0.0,
    mlp: ModuleSpec | None = None,
    document_mask: bool = False,
) -> ModuleSpec:
    """A transformer layer: self-attention, norms, and the sparse MLP.

    Args:
        implementation: attention, norm and attention projections by Transformer Engine ("te") or by this package
            and Megatron-Core alone ("local"); "auto": te where it can be used.
        qk_norm: normalise queries and keys per head.
        path, l1_coeff: see `SparseMLP`.
        mlp: another spec for the MLP, such as Megatron's own dense one.
        document_mask: core attention by this package in "te" too. Transformer Engine's attention, causal by type,
            looks at no mask that it is handed, and would see over the ends of documents.

    Checkpoints do not depend on `implementation`, nor on which of the two MLPs is built.
    """
    use_te = resolve_implementation(implementation) == "te"
    core_attention: Any = SDPAttention
    column: Any = ColumnParallelLinear
    row: Any = RowParallelLinear
    norm = _norm(implementation)
    if use_te:
        from megatron.core.extensions.transformer_engine import (
            TEDotProductAttention,
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
        )

        if not document_mask:
            core_attention = TEDotProductAttention
        column, row = TELayerNormColumnParallelLinear, TERowParallelLinear
    # Norms that Transformer Engine fuses into the next projection are saved under that projection's name; so are
    # those that stand alone.
    keys = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if not use_te:
        keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if use_te else norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=core_attention,
                    linear_proj=row,
                    q_layernorm=norm if qk_norm else IdentityOp,
                    k_layernorm=norm if qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp or sparse_mlp_spec(path, l1_coeff),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def megatron_layer_spec(
    implementation: Implementation = "auto", *, qk_norm: bool = False, normalization: str = "RMSNorm"
) -> ModuleSpec:
    """Megatron-Core's own GPT layer with its dense MLP, unchanged: what this package is measured against.

    With Transformer Engine the norms are fused into the projections after them; a state dict so names them
    `linear_qkv.layer_norm_weight` and `linear_fc1.layer_norm_weight`.
    """
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if resolve_implementation(implementation) == "te":
        return specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    return specs.get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization=normalization)


def block_spec(
    config: TransformerConfig,
    layer: ModuleSpec,
    implementation: Implementation,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """All layers of this rank's chunk and the norm after the last.

    A layer spec alone leaves that norm to Megatron-Core, whose own, without Transformer Engine, refuses sequence
    parallelism.
    """
    norm = _norm(implementation)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def hybrid_mlp_layer_spec(
    implementation: Implementation = "auto",
    *,
    path: Mode = "auto",
    l1_coeff: float = 0.0,
    l1_layers: int | None = None,
) -> ModuleSpec:
    """The `-` layer (an MLP alone) of HybridModel and MambaStack: put it in `mlp_layer` of their stack's spec.

    `l1_layers`: the number of `-` layers of the model; the config's `num_layers` counts the others too.
    """
    norm = _norm(implementation)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=sparse_mlp_spec(path, l1_coeff, l1_layers),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        ),
    )


@cache
def _expect_foreign_mlp() -> None:
    # Megatron-Core 0.16 warns, once for every layer, of any MLP that is not one of its own; it builds it all the same.
    logger = logging.getLogger("megatron.core.transformer.transformer_layer")
    logger.addFilter(lambda record: not str(record.msg).startswith("Unknown MLP type"))


gpt_layer = layer_spec()
"""Layer for `pretrain_gpt.py --spec`: Transformer Engine where it can be used; no L1 term."""

gpt_layer_local = layer_spec("local")
"""The same without Transformer Engine."""

hybrid_mlp_layer = hybrid_mlp_layer_spec()
"""`-` layer for hybrid models; no L1 term."""
