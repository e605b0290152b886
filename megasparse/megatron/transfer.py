"""The weights of one model put into another on the same ranks: other layer classes, or more layers.

Deeper models are grown from trained shallow ones (progressive stacking, Gong et al. 2019): every layer of the shallow
one is repeated in place, n times, with 1/n of its output projections. The residual stream so goes through nearly the
values that it had, in smaller steps, and every feed-forward layer sees inputs like those it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_ALIASES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
"""Two names of one norm: fused into the projection after it, or alone."""
_DOWN = "mlp.linear_fc2.weight"
_OUTPUTS = ("self_attention.linear_proj.weight", _DOWN)
_LAYER = re.compile(r"(?<=\blayers\.)\d+")


def weights_of(chunks: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    """Copies of this rank's parameters by name, without the names that wrappers add, in Megatron's own layout; one dict
    a chunk."""
    return [{_bare(name): _relaid(name, p, p.detach()).clone() for name, p in c.named_parameters()} for c in chunks]


@torch.no_grad()
def set_weights(chunks: Sequence[nn.Module], weights: Sequence[Mapping[str, Tensor]]) -> None:
    """Puts `weights_of` a model of the same widths into this one; the optimizer must be told by its caller.

    Raises:
        ValueError: a parameter has no counterpart, or another shape, or the layers cannot be repeated.
    """
    if len(chunks) != len(weights):
        raise ValueError(f"the weights are of {len(weights)} pipeline chunks, the model has {len(chunks)}")
    for chunk, known in zip(chunks, weights, strict=True):
        there, here = _layers(known), _layers(dict(chunk.named_parameters()))
        if there > here:
            raise ValueError(f"the weights are of {there} layers, the model has only {here}")
        source = [layer * there // here for layer in range(here)]
        for name, parameter in chunk.named_parameters():
            bare = _bare(name)
            match = _LAYER.search(bare)
            layer = source[int(match.group())] if match else 0
            value = _relaid(name, parameter, _find(known, _LAYER.sub(str(layer), bare)))
            if value.shape != parameter.shape:
                raise ValueError(f"{bare} has shape {list(parameter.shape)}, the weights' is {list(value.shape)}")
            if match and bare.endswith(_OUTPUTS):
                value = value / source.count(layer)
            parameter.copy_(value)


def _bare(name: str) -> str:
    return re.sub(r"^(module\.)+", "", name)


def _relaid(name: str, parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value` from a parameter's layout to Megatron's, or back. The sparse MLP alone stores the down projection by
    neuron, which its shape does not tell where it is square; that its rows are cut over ranks does."""
    by_neuron = name.endswith(_DOWN) and getattr(parameter, "partition_dim", 1) == 0
    return value.t() if by_neuron else value


def _layers(names: Mapping[str, Tensor]) -> int:
    return len({match.group() for match in map(_LAYER.search, names) if match})


def _find(known: Mapping[str, Tensor], name: str) -> Tensor:
    candidates = [name]
    for one, other in _ALIASES:
        candidates += [name.replace(one, other), name.replace(other, one)]
    for candidate in candidates:
        if candidate in known:
            return known[candidate]
    raise ValueError(f"the weights hold no {name}")
