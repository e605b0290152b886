"""GPTModel from the configuration: its TransformerConfig, its chunks on this rank, its first weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megasparse.config import Config, ConfigError, RopeScaling
from megasparse.megatron.cpu_runtime import enable_cpu_runtime
from megasparse.megatron.cross_entropy import cross_entropy
from megasparse.megatron.fp8 import fp8_options
from megasparse.megatron.init import initialize
from megasparse.megatron.sparse_mlp import iter_sparse_mlps
from megasparse.megatron.spec import (
    block_spec,
    implementation_problem,
    layer_spec,
    resolve_implementation,
    transformer_engine_problem,
)


def transformer_config(cfg: Config) -> TransformerConfig:
    """Megatron-Core's view of the configuration.

    `calculate_per_token_loss` is on: the loss function returns a sum over tokens and their number, Megatron divides
    by the number of the whole batch. What training sets later (`finalize_model_grads_func`, `grad_scale_func`, ...)
    is left at its default.

    Raises:
        ConfigError: where the configuration needs Transformer Engine and this machine cannot do it.
    """
    enable_cpu_runtime()
    _check_transformer_engine(cfg)
    model, parallel, training = cfg.model, cfg.parallel, cfg.training
    cuda = torch.cuda.is_available()
    options = fp8_options(cfg)
    use_te = resolve_implementation(model.implementation) == "te"
    bf16 = training.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunks = parallel.chunks if parallel.chunks > 1 else None
    if training.recompute == "full":
        # "uniform" in units of one layer recomputes all of them; "block" recomputes the first so many.
        options["recompute_method"] = "block" if training.recompute_layers else "uniform"
        options["recompute_num_layers"] = training.recompute_layers or 1
    elif training.recompute == "selective":
        options["recompute_modules"] = list(training.recompute_modules)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_width,
        gated_linear_unit=model.gated,
        activation_func=F.relu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method_std=model.init_std,
        # `initialize` does it, independently of the layout. Megatron's own pass still marks what is sharded.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        # Interleaved stages send to both neighbours at once, which on two stages is the same pair of ranks.
        overlap_p2p_comm=chunks is not None,
        batch_p2p_comm=chunks is None,
        # Gloo may still be sending what this frees; NCCL's streams keep it alive.
        deallocate_pipeline_outputs=cuda and parallel.pipeline > 1,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=cuda and _grad_accum_fusion_available,
        cross_entropy_loss_fusion=cuda,
        # For a dropout alone: without one, a residual is one addition, and torch.compile, by which Megatron fuses,
        # takes the host ten times as long to call as that.
        bias_dropout_fusion=cuda and model.hidden_dropout > 0,
        apply_rope_fusion=use_te,
        deterministic_mode=training.deterministic,
        recompute_granularity=None if training.recompute == "none" else training.recompute,
        **options,
    )


def _check_transformer_engine(cfg: Config) -> None:
    training = cfg.training
    found = [implementation_problem(cfg.model.implementation)]
    if training.recompute == "selective" and "layernorm" in training.recompute_modules:
        key, value = "training.recompute_modules", list(training.recompute_modules)
        why = "Megatron-Core recomputes layernorm only with"
        found.append(transformer_engine_problem(key, value, why, "leave layernorm out"))
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise ConfigError(problems, host_specific=True)


class LanguageModel(GPTModel):
    """Megatron's GPTModel with this package's cross entropy."""

    own_cross_entropy = True
    """False: Megatron's."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [b, s], logits [s, b, V / tp] (which the backward overwrites) -> loss of every token, fp32 [b, s]."""
        if not self.own_cross_entropy:
            return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]
        loss = cross_entropy(logits.contiguous(), labels.t().contiguous(), self.pg_collection.tp)
        return loss.t().contiguous()


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_model(cfg: Config, layer: ModuleSpec | None = None) -> list[GPTModel]:
    """This rank's chunks of the model, with their first weights, before data-parallel wrapping.

    Megatron's process groups (`parallel_state.initialize_model_parallel`) and random states
    (`model_parallel_cuda_manual_seed`) must be there. One chunk, or one for each virtual stage, in order. The weights
    depend on `training.seed` alone, not on the layout.

    Args:
        layer: another transformer layer than `layer_spec` with the sparse MLP, such as `megatron_layer_spec`.
    """
    config = transformer_config(cfg)
    if layer is None:
        layer = layer_spec(
            cfg.model.implementation,
            qk_norm=cfg.model.qk_norm,
            path=cfg.sparsity.path,
            document_mask=cfg.data.reset_attention_mask,
        )
    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in [None] if virtual is None else range(virtual):
        chunk = LanguageModel(
            config=config,
            transformer_layer_spec=block_spec(config, layer, cfg.model.implementation, stage),  # type: ignore[arg-type]
            vocab_size=cfg.padded_vocab_size(),
            max_sequence_length=cfg.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=cfg.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=cfg.model.rotary_base,  # type: ignore[arg-type]
            vp_stage=stage,
        )
        if cfg.model.rope_scaling is not None:
            _scale_rotary(chunk, cfg.model.rope_scaling)
        relay_padding_mask(chunk)
        if cfg.model.attention_dropout == 0:
            _leave_random_states(chunk)
        if chunk.post_process and cfg.padded_vocab_size() > cfg.vocab_size:
            _exclude_padding(chunk, cfg.vocab_size)
        chunks.append(chunk)
    initialize(
        chunks,
        seed=cfg.training.seed,
        std=cfg.model.init_std,
        num_layers=cfg.model.num_layers,
        scale_output=cfg.model.scale_output_init,
        tied=cfg.model.tie_embeddings,
        rank=parallel_state.get_tensor_model_parallel_rank(),
        size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    return chunks


def _exclude_padding(chunk: GPTModel, vocab_size: int) -> None:
    """Gives rows that only pad the vocabulary the probability zero.

    Otherwise the loss would depend on how many there are (on tensor parallelism, that is), and would not be that of
    the model in other formats, where they are cut off.
    """

    def mask(_: torch.nn.Module, __: Any, output: tuple[torch.Tensor, Any]) -> None:
        logits = output[0]  # [s, b, this rank's rows], or all rows where they are gathered
        gathered = logits.shape[-1] == chunk.vocab_size
        first = 0 if gathered else parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        # Outside of autograd, which would copy the whole gradient: that of a probability of zero is zero anyway.
        logits.detach()[..., max(0, vocab_size - first) :] = -torch.inf

    chunk.output_layer.register_forward_hook(mask)


def _leave_random_states(chunk: GPTModel) -> None:
    """Transformer Engine's attention switches to a random state of Megatron's and back, for dropout. Where nothing is
    drawn that only takes the host's time, and no CUDA graph could hold it."""
    for module in chunk.modules():
        if hasattr(module, "attention_dropout_ctx"):
            module.attention_dropout_ctx = nullcontext  # type: ignore[assignment]
        if hasattr(module, "rng_states_tracker"):
            module.rng_states_tracker = None


def _scale_rotary(chunk: GPTModel, scaling: RopeScaling) -> None:
    # GPTModel passes on the factor alone and fixes the rest to the values of Llama 3.1 8B.
    rotary = chunk.rotary_pos_emb
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
    )


def relay_padding_mask(chunk: GPTModel) -> None:
    """Give the decoder's sparse MLPs its padding mask where Megatron does not pass it on.

    TransformerBlock passes the mask to layers that it recomputes and to all layers where nothing is recomputed, but
    (Megatron-Core 0.16, `recompute_method="block"`) not to those that it leaves out of recomputation. These run only
    inside the block's own forward, while the mask is at hand.
    """
    current: list[torch.Tensor | None] = [None]

    def remember(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        current[0] = kwargs.get("padding_mask")

    def forget(*_: Any) -> None:
        current[0] = None

    chunk.decoder.register_forward_pre_hook(remember, with_kwargs=True)
    chunk.decoder.register_forward_hook(forget, always_call=True)
    for mlp in iter_sparse_mlps(chunk.decoder):
        mlp.fallback_mask = lambda: current[0]
