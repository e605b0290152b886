"""Core attention by PyTorch's `scaled_dot_product_attention`, for where Transformer Engine is not used.

Megatron-Core's local core attention holds the matrix of scores and refuses context parallelism. This one is memory
efficient, takes grouped queries, an explicit mask (document boundaries), and context parallelism: every rank gathers
the keys and values of the whole sequence and computes its own queries; the gradients of keys and values are reduced
and scattered back. Ranks hold two chunks of the sequence each, r and 2 * size - 1 - r of 2 * size, as Megatron's
`get_batch_on_this_cp_rank` cuts them, so that causal work is balanced.
"""

from __future__ import annotations

import contextlib
import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)

_biases: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Attention mask -> its version and the type of the queries, what is added to the scores. All layers get the same mask.
Given that, PyTorch makes a matrix of the queries' type of it, and each layer would keep its own for the backward."""


class SDPAttention(MegatronModule):
    """A drop-in for `megatron.core.transformer.dot_product_attention.DotProductAttention`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        softmax = getattr(config, "softmax_type", "vanilla")
        if config.window_size is not None or softmax != "vanilla":
            raise NotImplementedError(
                f"a sliding window (window_size: {config.window_size}) or another softmax (softmax_type: {softmax}) "
                "needs Transformer Engine's attention (implementation: te)"
            )
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        width = config.kv_channels
        assert width is not None
        # Whatever `apply_query_key_layer_scaling` says: Megatron multiplies by the layer's number again in its softmax.
        self.scale = 1.0 / math.sqrt(width) if softmax_scale is None else softmax_scale
        self.cp_size = config.context_parallel_size
        self.cp_group = None
        if self.cp_size > 1:
            group = getattr(pg_collection, "cp", None) if pg_collection is not None else None
            self.cp_group = group if group is not None else parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, heads / tp, width].
            key, value: [sk, b, groups / tp, width]; the groups divide the heads.
            attention_mask: bool, broadcastable to [b, heads, sq, sk of the whole sequence], True where a query must
                not look; it then says all, causality too (as Megatron's GPTDataset makes it). None: causal, or
                everything where the mask type is not causal.
            attn_mask_type: overrides the type given when the module was built.

        Returns:
            [sq, b, heads / tp * width].

        Raises:
            NotImplementedError: for packed sequences or an attention bias, which Transformer Engine offers.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError(
                "packed sequences and attention bias need Transformer Engine's attention (implementation: te); "
                "this one takes a mask"
            )
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        if self.cp_size > 1:
            key, value = self._whole_sequence(key), self._whole_sequence(value)
        bias = None if attention_mask is None else _mask_bias(attention_mask, query.dtype)
        if bias is None and causal and query.size(0) != key.size(0):
            rank = 0 if self.cp_group is None else self.cp_group.rank()
            bias = _causal_bias(query.size(0), key.size(0), rank, self.cp_size, query.device, query.dtype)
        # [s, b, heads, width] -> [b, heads, s, width]
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if bias is not None and k.size(1) != q.size(1):
            # With a mask only the kernel that holds the whole matrix of scores takes grouped heads.
            k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), dim=1) for tensor in (k, v))
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            context = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=bias,
                dropout_p=dropout,
                is_causal=causal and bias is None,
                scale=self.scale,
                enable_gqa=k.size(1) != q.size(1),
            )
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _random_state(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        # As in Megatron: heads of other tensor-parallel ranks drop other entries. Under sequence parallelism
        # TransformerBlock has switched to the tensor-parallel random state already.
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    def _whole_sequence(self, tensor: Tensor) -> Tensor:
        """[s / cp, ...] of this rank's two chunks -> [s, ...] in order; the backward reduces and scatters."""
        gathered = gather_from_sequence_parallel_region(tensor, group=self.cp_group)
        chunks = gathered.view(self.cp_size, 2, tensor.size(0) // 2, *tensor.shape[1:])
        return torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten(0, 1)


def _mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`_bias` of a mask, remembered while that stays as it is."""
    if mask.is_inference():  # which has no version: it may have changed
        return _bias(mask, dtype)
    state, known = (mask._version, dtype), _biases.get(mask)
    if known is None or known[0] != state:
        _biases[mask] = known = state, _bias(mask, dtype)
    return known[1]


@lru_cache(maxsize=1)
def _causal_bias(queries: int, keys: int, rank: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`_bias` [queries, keys] of causality, remembered for all layers and steps.

    `rank`, `size`: in the context-parallel group. Without one the queries are the last of the sequence (generation with
    cached keys).
    """
    if size == 1:
        positions = torch.arange(keys - queries, keys, device=device)
    else:
        chunk, last = queries // 2, 2 * size - 1 - rank
        first = torch.arange(rank * chunk, (rank + 1) * chunk, device=device)
        positions = torch.cat((first, torch.arange(last * chunk, (last + 1) * chunk, device=device)))
    return _bias(torch.arange(keys, device=device)[None, :] > positions[:, None], dtype)


def _bias(forbidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0, or, where `forbidden`, so little that the weight beside any other is exactly 0.

    Not -inf, of which cuDNN's attention may make NaN (PyTorch gives it a finite number for a mask of bools), and not
    the least number, which the change to exponents of two would make infinite.
    """
    with torch.inference_mode(False):  # what is remembered may serve a training step later
        bias = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
        return bias.masked_fill_(forbidden, torch.finfo(dtype).min / 2)
