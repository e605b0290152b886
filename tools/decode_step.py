"""One step of greedy decoding at a fixed context, as one CUDA graph, for `benchmark_inference.py`.

A step of a small model takes about a millisecond on the GPU and several on a host that launches kernel by kernel, so
servers replay graphs. Here every decoder layer is compiled (one graph for all layers: `layer_idx` is the same while it
runs, each layer having a cache of its own) and the whole step, embedding to next token, is captured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class LayerCache:
    """Keys and values [b, heads, length, d] of one layer, written at one position and read whole."""

    def __init__(self, shape: tuple[int, ...], position: Tensor, dtype: torch.dtype) -> None:
        self.keys = torch.randn(shape, device=position.device, dtype=dtype)
        self.values = torch.randn(shape, device=position.device, dtype=dtype)
        self.position = position

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


class DecodeStep:
    """`batch` sequences of `context` random past tokens. Each call computes the next token of each."""

    def __init__(self, model: Any, batch: int, context: int, rows: Tensor | None, recorded_tokens: int) -> None:
        config, device, dtype = model.config, model.device, model.dtype
        generator = torch.Generator("cpu").manual_seed(0)
        self.model, self.rows, self.recorded_tokens = model, rows, recorded_tokens
        self.token = torch.randint(config.vocab_size, (batch, 1), generator=generator).to(device)
        self.position = torch.tensor([context], device=device)
        self.mask = torch.ones(1, 1, 1, context + 1, dtype=torch.bool, device=device)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, context + 1, head)
        torch.manual_seed(0)
        self.caches = [LayerCache(shape, self.position, dtype) for _ in model.model.layers]
        self.logits = torch.empty(0)

    def __call__(self) -> None:
        core = self.model.model
        hidden = core.embed_tokens(self.token)
        positions = self.position.unsqueeze(0)
        rotary = core.rotary_emb(hidden, position_ids=positions)
        for layer, cache in zip(core.layers, self.caches, strict=True):
            hidden = layer(
                hidden,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        self.logits = self.model.lm_head(core.norm(hidden))
        self.token.copy_(self.logits.argmax(-1))
        if self.rows is not None:  # the next recorded token of each sequence
            self.rows.add_(1).remainder_(self.recorded_tokens)

    def capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph


@contextmanager
def one_layer_index(model: Any) -> Iterator[None]:
    """All layers of the model have index 0."""
    attentions = [layer.self_attn for layer in model.model.layers]
    before = [attention.layer_idx for attention in attentions]
    for attention in attentions:
        attention.layer_idx = 0
    try:
        yield
    finally:
        for attention, index in zip(attentions, before, strict=True):
            attention.layer_idx = index
