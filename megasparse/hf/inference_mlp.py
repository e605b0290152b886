"""The module that stands in for a transformers MLP: same parameters under the same names, two ways to compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megasparse.mlp import TOKEN_TILE, device_reason
from megasparse.mlp.cuda import note_dense
from megasparse.mlp.dense_elementwise import statistics
from megasparse.mlp.dispatch import Mode
from megasparse.mlp.inference import NEVER, fewest_tokens, sparse_inference

OBSERVED_TOKENS = 16384
"""At most this many tokens of a call are looked at: 128 tiles."""


class LayerSparsity(NamedTuple):
    """What a layer's gate did for some tokens."""

    l0: float
    """Mean active neurons per token."""
    union_fraction: float
    """Mean share of neurons active for any of 128 consecutive tokens."""


class InferenceMLP(nn.Module):
    """A gated or non-gated ReLU MLP of transformers that computes only what active neurons need, where that is faster.

    The projections are the original's own modules. Where the kernels apply, their weights are laid out as the kernels
    read them, once in memory: gate and up one after the other, down by neuron; the parameters are views of that.

    Calls of `sparse_from` tokens and more run sparse. It is chosen by the first call of at least 128 tokens outside
    torch.compile and CUDA graphs (one host synchronisation a layer), or by `choose`. Until then (None), for fewer
    tokens, and where gradients are recorded, the original computes.

    Args:
        original: with `up_proj`, `down_proj`, `act_fn`, and `gate_proj` if gated.
        mode: "auto"; "dense": the original; "sparse": the sparse path for every call, on CPU its reference.
    """

    w_in: Tensor | None
    w_down: Tensor | None

    def __init__(self, original: nn.Module, mode: Mode) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self._original = (original,)  # in a tuple: not a child, which would double the parameters
        self.mode: Mode = mode
        self.gated = hasattr(original, "gate_proj")
        self.register_buffer("w_in", None, persistent=False)
        self.register_buffer("w_down", None, persistent=False)
        self._packed = False
        self.sparse_from: int | None = NEVER
        self.train(original.training)
        self.register_load_state_dict_post_hook(lambda module, _: module.prepare())
        self.prepare()

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def _weight(self, name: str) -> Tensor:
        return getattr(self, name).weight

    def prepare(self) -> None:
        """Lay out the weights for where they are now, and forget `sparse_from`."""
        weight = self._weight("up_proj")
        hidden, width = weight.shape
        reason = None if self.mode == "dense" else device_reason(weight.device, weight.dtype, width, hidden)
        on_cpu = self.mode == "sparse" and weight.device.type == "cpu"
        if self.mode == "dense" or (reason is not None and not on_cpu):
            if reason is not None:
                note_dense(reason)
            self.sparse_from = NEVER
            self.unpack()
        else:
            self.sparse_from = None if self.mode == "auto" else 1
            self._pack()

    @torch.no_grad()
    def _pack(self) -> None:
        self._packed = True
        up, down = self._weight("up_proj"), self._weight("down_proj")
        self.w_down = down.t().contiguous()
        down.data = self.w_down.t()
        if not self.gated:
            self.w_in = up.detach()
            return
        gate = self._weight("gate_proj")
        self.w_in = torch.cat([gate, up])
        gate.data, up.data = self.w_in.chunk(2)

    @torch.no_grad()
    def unpack(self) -> None:
        """Give each parameter its own contiguous memory again."""
        if not self._packed:
            return
        self._packed, self.w_in, self.w_down = False, None, None
        for name in ("gate_proj", "up_proj", "down_proj") if self.gated else ("down_proj",):
            weight = self._weight(name)
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)

    def _apply(self, fn: Any, recurse: bool = True) -> InferenceMLP:
        # .to() and its like make a tensor of its own of each parameter: lay them out anew afterwards.
        self.w_in = self.w_down = None
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def forward(self, x: Tensor) -> Tensor:
        # In the order that decoding, where the host is the limit, leaves soonest.
        tokens = x.numel() // x.shape[-1]
        if self.sparse_from is None and tokens >= TOKEN_TILE and not _recording(x):
            self.choose(self.observe(x))
        if self.sparse_from is None or tokens < self.sparse_from:
            return self._original[0](x)
        if torch.is_grad_enabled() and (x.requires_grad or self._weight("down_proj").requires_grad):
            note_dense("gradients are recorded; call the model under torch.inference_mode()")
            return self._original[0](x)
        w_in, w_down = self.w_in, self.w_down
        assert w_in is not None
        assert w_down is not None
        return sparse_inference(x.reshape(tokens, -1).contiguous(), w_in, w_down).view(x.shape)

    def choose(self, found: LayerSparsity) -> None:
        """Choose `sparse_from` from what the layer does."""
        hidden, width = self._weight("up_proj").shape
        self.sparse_from = fewest_tokens(found.union_fraction, width, hidden)

    @torch.no_grad()
    def observe(self, x: Tensor) -> LayerSparsity:
        """What the gate does for the tokens of x [..., D]. Synchronises with the host."""
        weight = self._weight("gate_proj" if self.gated else "up_proj")
        tokens = x.reshape(-1, x.shape[-1])[:OBSERVED_TOKENS]
        counts = statistics(nn.functional.linear(tokens, weight) > 0, None, 1)[0]
        number, active, union, tiles = counts.tolist()
        return LayerSparsity(active / number, union / tiles / weight.shape[0])


def _recording(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
