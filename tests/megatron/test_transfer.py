"""Weights of one model in another: other names and layouts, more layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megasparse.megatron.transfer import set_weights, weights_of


class Layer(nn.Module):
    """One residual layer with the names of a transformer layer."""

    def __init__(self, fused: bool, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.linear_fc1, self.mlp.linear_fc2 = nn.Module(), nn.Module()
        norm = nn.Parameter(torch.ones(4))
        if fused:
            self.mlp.linear_fc1.layer_norm_weight = norm
        else:
            self.pre_mlp_layernorm = nn.Module()
            self.pre_mlp_layernorm.weight = norm
        down = nn.Parameter(torch.randn(*(4, hidden) if fused else (hidden, 4)))
        down.partition_dim = 1 if fused else 0  # type: ignore[attr-defined]
        self.mlp.linear_fc2.weight = down


def model(layers: int, fused: bool = False, hidden: int = 6) -> nn.Module:
    chunk = nn.Module()
    chunk.decoder = nn.Module()
    chunk.decoder.layers = nn.ModuleList(Layer(fused, hidden) for _ in range(layers))
    chunk.embedding = nn.Embedding(3, 4)
    return chunk


@pytest.mark.parametrize("hidden", [6, 4], ids=["", "square weight"])
@pytest.mark.parametrize("to_megatron", [True, False])
def test_other_names_and_the_other_layout_of_the_down_projection(to_megatron: bool, hidden: int) -> None:
    ours, megatrons = model(2, hidden=hidden), model(2, fused=True, hidden=hidden)
    ours.decoder.layers[1].pre_mlp_layernorm.weight.data.fill_(3.0)  # type: ignore[index, union-attr]
    target, source = (megatrons, ours) if to_megatron else (ours, megatrons)
    set_weights([target], weights_of([source]))
    for own, other in zip(ours.decoder.layers, megatrons.decoder.layers, strict=True):  # type: ignore[arg-type]
        assert torch.equal(own.mlp.linear_fc2.weight.t(), other.mlp.linear_fc2.weight)
        assert torch.equal(own.pre_mlp_layernorm.weight, other.mlp.linear_fc1.layer_norm_weight)
    assert torch.equal(ours.embedding.weight, megatrons.embedding.weight)


def test_growth_repeats_layers_in_place_and_divides_what_they_write() -> None:
    shallow, deep = model(2), model(5)
    set_weights([deep], weights_of([shallow]))
    outputs = [layer.mlp.linear_fc2.weight for layer in deep.decoder.layers]  # type: ignore[union-attr]
    first, second = (layer.mlp.linear_fc2.weight for layer in shallow.decoder.layers)  # type: ignore[union-attr]
    for layer, (source, count) in enumerate([(first, 3), (first, 3), (first, 3), (second, 2), (second, 2)]):
        assert torch.allclose(outputs[layer], source / count)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="of 3 layers, the model has only 2"):
        set_weights([model(2)], weights_of([model(3)]))
    weights = weights_of([model(2)])
    del weights[0]["embedding.weight"]
    with pytest.raises(ValueError, match=r"hold no embedding.weight"):
        set_weights([model(2)], weights)
