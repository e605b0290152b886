"""The sparse MLP as a Megatron-Core module: parallelism, L1 term, statistics, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none, log_single_rank
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megasparse.megatron.autograd import AttachL1, FusedWeightGrad
from megasparse.megatron.input_moments import InputMoments
from megasparse.megatron.neuron_weight import DownWeight, InWeight
from megasparse.megatron.stats import LayerStats
from megasparse.megatron.tensor_parallel import tensor_parallel_mlp
from megasparse.mlp import LayerRouter, MainGrads, MLPOutput, sparse_mlp
from megasparse.mlp.dispatch import Mode

_log = logging.getLogger("megasparse")

_gathered_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Sequence-parallel part of a padding mask -> its version, the whole. All layers of a forward pass get the same."""


class SparseMLP(MegatronModule):
    """Drop-in for Megatron's `MLP` with ReLU: `relu(x Wg^T) * (x Wu^T) Wd`, or `relu(x Wu^T) Wd`, without biases.

    Takes its size, gating (`gated_linear_unit`), parallelism, types and initialisation from the TransformerConfig.
    Checkpoints are those of Megatron's dense MLP, in either direction, at any tensor and pipeline parallelism.
    Computes in `params_dtype` whatever `config.fp8` asks of Transformer Engine's modules beside it.

    The L1 term, `l1_coeff * mean over layers of mean over tokens of sum_n |h_n|`, enters the graph here, not in the
    loss function. With `config.calculate_per_token_loss` it is a sum over this micro-batch's counted tokens, which
    Megatron divides, as it does with the cross entropy, by the number of tokens of the whole batch: exact for any
    parallel layout, micro-batching and mask, provided that the loss and `padding_mask` leave out the same tokens.
    Otherwise it is a mean over the micro-batch's counted tokens divided by the number of micro-batches.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        *,
        path: Mode = "auto",
        l1_coeff: float = 0.0,
        l1_layers: int | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        ffn_hidden_size: int | None = None,
        is_expert: bool = False,
        **_: Any,
    ) -> None:
        """Build.

        Args:
            config: of the model; `add_bias_linear` must be off. Its `activation_func` should be ReLU: SiLU and GELU,
                which Megatron-LM's arguments set, are taken for ReLU with a warning, others are refused.
            path: "dense", "sparse", or "auto": whichever pays, decided by `router`.
            l1_coeff: first value of `self.l1_coeff`.
            l1_layers: number of sparse MLPs in the whole model, over which the L1 term is averaged; None: all layers.
            tp_group, pg_collection: tensor-parallel group; None: Megatron's current one.
            ffn_hidden_size: None: the config's.

        Raises:
            ValueError: for a config that asks for what this module does not compute.
        """
        super().__init__(config=config)
        ffn = ffn_hidden_size or config.ffn_hidden_size
        if pg_collection is not None and tp_group is None:
            tp_group = getattr(pg_collection, "tp", None)
        self.tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        _check(config, ffn, self.tp_group.size(), is_expert)
        assert ffn is not None
        hidden = ffn // self.tp_group.size()
        gates = 2 if config.gated_linear_unit else 1
        self.ffn_hidden_size = ffn
        """Neurons of the whole layer."""
        self.hidden = hidden
        """Neurons of this tensor-parallel rank."""
        self.linear_fc1 = InWeight(config, gates * hidden, self.tp_group, config.init_method, stride=gates)
        self.linear_fc2 = DownWeight(config, hidden, self.tp_group, config.output_layer_init_method)
        self.sequence_parallel = bool(config.sequence_parallel) and self.tp_group.size() > 1
        self.layer_number = 0
        """1-based over the whole model, whatever the pipeline; TransformerLayer sets it."""
        self.l1_layers = l1_layers or config.num_layers
        device = torch.device(torch.cuda.current_device())
        # Plain attributes, not buffers: no checkpoint holds them and `model.bfloat16()` leaves them alone.
        self.l1_coeff = torch.tensor(float(l1_coeff), dtype=torch.float32, device=device)
        """fp32 [] on the device: write to it in place to change the coefficient without a synchronisation."""
        self._share: tuple[int, Tensor] | None = None
        self.recorder = LayerStats(hidden, device)
        self.input_moments: InputMoments | None = None
        """Where training steps count their inputs, while somebody wants to know."""
        self.router = LayerRouter(path, hidden, config.hidden_size, device=device, dtype=config.params_dtype)
        self.fallback_mask: Callable[[], Tensor | None] = lambda: None
        """Where the padding mask comes from if the caller has none; see `model.relay_padding_mask`."""

    def set_layer_number(self, layer_number: int) -> None:
        """Called by TransformerLayer with the 1-based number over the whole model."""
        self.layer_number = layer_number
        self.router.name = f"layer {self.layer_index}"

    @property
    def layer_index(self) -> int:
        """0-based over the whole model."""
        return self.layer_number - 1

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """Apply the MLP.

        Args:
            hidden_states: [s, b, D]; under sequence parallelism [s / tp, b, D].
            padding_mask: bool [b, s] or, under sequence parallelism, also [b, s / tp]: True where the token counts
                in no loss (padding). Such tokens are computed but count neither in the L1 term nor in statistics.

        Returns:
            The output, shaped as the input, and no bias.
        """
        x = hidden_states
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(hidden_states.detach(), group=self.tp_group)
        if self.input_moments is not None and self.training:
            self.input_moments.add(x)
        mask = self._token_mask(padding_mask if padding_mask is not None else self.fallback_mask(), x)
        w_in, w_down, main_grads = self._weights()
        compute: Callable[..., MLPOutput] = sparse_mlp
        if self.tp_group.size() > 1:
            compute = partial(tensor_parallel_mlp, hidden_states, group=self.tp_group)
        out = compute(
            x,
            w_in,
            w_down,
            token_mask=mask,
            sequences=x.shape[1],
            path=self.router.path,
            order=self.router.order,
            capacity=self.router.capacity(x.shape[0] * x.shape[1]),
            main_grads=main_grads,
        )
        y = out.y
        # Counted once whatever is recomputed: in training in the backward, which alone runs once; else here.
        if not self.training:
            self.recorder.add(out.stats, out.l1, training=False)
        if torch.is_grad_enabled() and y.requires_grad:
            count = partial(self.recorder.add, out.stats, out.l1.detach()) if self.training else None
            y = AttachL1.apply(y, out.l1, self._l1_scale(out.stats.tokens), count)
        if self.tp_group.size() == 1:
            return y, None
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(y, group=self.tp_group), None

    def _weights(self) -> tuple[Tensor, Tensor, MainGrads | None]:
        """The weights as the operation takes them, and where it may add their gradients."""
        w_in, w_down = self.linear_fc1(), self.linear_fc2()
        if not (torch.is_grad_enabled() and _fusable(w_in) and _fusable(w_down)):
            return w_in, w_down, None
        grads = MainGrads(w_in.main_grad, w_down.main_grad)  # type: ignore[attr-defined]
        return FusedWeightGrad.apply(w_in, w_in), FusedWeightGrad.apply(w_down, w_down), grads

    def _token_mask(self, padding: Tensor | None, x: Tensor) -> Tensor | None:
        """bool [s, b] of the tokens that count, from Megatron's padding mask [b, s] or [b, s / tp]."""
        if padding is None:
            return None
        tokens, batch = x.shape[:2]
        mask = padding.bool()
        if self.sequence_parallel and mask.shape == (batch, tokens // self.tp_group.size()):
            # GPTModel has scattered it, but on the first pipeline stage only.
            mask = _gather_mask(padding, self.tp_group)
        if mask.shape != (batch, tokens):
            raise ValueError(
                f"layer {self.layer_index}: padding_mask must be [{batch}, {tokens}] (batch, sequence); "
                f"got {tuple(padding.shape)}"
            )
        return ~mask.t()

    def _layer_coefficient(self) -> Tensor:
        """fp32 []: this layer's share of the coefficient; divided anew when that has been written to."""
        version = self.l1_coeff._version
        if self._share is None or self._share[0] != version:
            self._share = version, self.l1_coeff / self.l1_layers
        return self._share[1]

    def _l1_scale(self, tokens: Tensor) -> Tensor:
        """fp32 []: the gradient of the loss, as Megatron scales it, by this layer's sum of |h|."""
        scale = self._layer_coefficient()
        if not self.config.calculate_per_token_loss:
            scale = scale / (tokens.clamp(min=1) * _microbatches())
        if self.config.grad_scale_func is not None:
            scale = self.config.grad_scale_func(scale)
        return scale


def iter_sparse_mlps(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[SparseMLP]:
    """Every SparseMLP of a model or of its chunks on this rank (wrapped or not), in order of the layers."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, SparseMLP)]
    return iter(sorted(found, key=lambda mlp: mlp.layer_number))


def _fusable(weight: torch.nn.Parameter) -> bool:
    main = getattr(weight, "main_grad", None)
    return (
        weight.requires_grad
        and isinstance(main, Tensor)
        and main.dtype == torch.float32
        and main.shape == weight.shape
        and main.is_contiguous()
        # The kernels add pairs. Without the distributed optimizer, gradients lie side by side whatever their sizes.
        and main.storage_offset() % 2 == 0
        and hasattr(weight, "grad_added_to_main_grad")
        # Megatron's FSDP: memory of an earlier micro-batch, which it takes back between this forward and its backward.
        and not hasattr(weight, "__fsdp_param__")
    )


def _gather_mask(padding: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """bool [b, s / tp] of every tensor-parallel rank -> bool [b, s]; remembered while `padding` stays as it is."""
    version = None if padding.is_inference() else padding._version
    known = _gathered_masks.get(padding)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    parts = padding.bool().t().contiguous().to(torch.uint8)
    whole = gather_from_sequence_parallel_region(parts, group=group).bool().t()
    _gathered_masks[padding] = version, whole
    return whole


@cache
def _log_once(message: str) -> None:
    log_single_rank(_log, logging.WARNING, message)


def _microbatches() -> int:
    try:
        return get_num_microbatches()
    except AttributeError as error:
        raise RuntimeError(
            "the L1 term needs the number of micro-batches where calculate_per_token_loss is off: call "
            "megatron.core.num_microbatches_calculator.init_num_microbatches_calculator first, or set "
            "calculate_per_token_loss (Megatron-LM: --calculate-per-token-loss)"
        ) from error


def _captured_by_megatron(config: TransformerConfig) -> bool:
    if config.cuda_graph_impl == "none":
        return False
    parts = getattr(config, "cuda_graph_modules", config.cuda_graph_scope) or ()  # none named: whole layers
    names = {getattr(part, "name", part) for part in parts}
    return not names or bool(names & {"mlp", "full_iteration"})


def _check(config: TransformerConfig, ffn: int | None, tp: int, is_expert: bool) -> None:
    wrong = []
    if config.activation_func in (F.silu, F.gelu):
        # Megatron-LM's arguments cannot say ReLU; --swiglu is how they say gated, and GELU is their default.
        name = config.activation_func.__name__
        _log_once(f"config.activation_func is {name}; the sparse MLP computes ReLU in its place")
    elif config.activation_func not in (F.relu, torch.relu):
        wrong.append(f"activation_func is {config.activation_func}, not torch.nn.functional.relu")
    if config.add_bias_linear:
        wrong.append("add_bias_linear is on (Megatron-LM: --disable-bias-linear)")
    if config.glu_linear_offset:
        wrong.append(f"glu_linear_offset is {config.glu_linear_offset}, not 0")
    if config.activation_func_clamp_value is not None:
        wrong.append("activation_func_clamp_value is set")
    if is_expert:
        wrong.append("it is an expert of a mixture")
    if config.fp4:
        wrong.append("fp4 is on")
    if _captured_by_megatron(config):
        # A graph would go on with the coefficient, the path and the order of rows that it was captured with.
        wrong.append(
            f"cuda_graph_impl {config.cuda_graph_impl} captures the MLP too (Megatron-LM: --cuda-graph-scope attn, or "
            "--cuda-graph-modules attn from 0.19 on, leaves it out)"
        )
    chunks = getattr(config, "mlp_chunks_for_training", 1)  # from Megatron-Core 0.19 on
    if chunks > 1:
        # Without their part of the padding mask, and each would count as a micro-batch in the L1 term's mean.
        wrong.append(f"mlp_chunks_for_training is {chunks}: Megatron gives it one part of the sequence at a time")
    if config.enable_autocast and config.autocast_dtype != config.params_dtype:
        wrong.append(f"enable_autocast is on with {config.autocast_dtype}, params_dtype being {config.params_dtype}")
    if config.fp8 and config.recompute_granularity == "selective" and "mlp" in (config.recompute_modules or ()):
        # PyTorch's checkpoint, to which Transformer Engine's leaves foreign modules, refuses the padding mask.
        wrong.append("recompute_modules has mlp, which under fp8 works for Transformer Engine's own modules alone")
    if not ffn or ffn % tp:
        wrong.append(f"ffn_hidden_size {ffn} is not divisible by the tensor-parallel size {tp}")
    if wrong:
        raise ValueError("SparseMLP does not support this config: " + "; ".join(wrong))
