"""What the training loop tells the routers of the layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megasparse.config import parse_config
from megasparse.megatron import LayerStats
from megasparse.mlp import LayerRouter
from megasparse.training.layer_stats import LayerCounts
from megasparse.training.loop import route
from tests.training.cases import configuration


def test_neurons_are_ordered_by_how_often_they_fired_since_the_last_decision() -> None:
    """Not since the beginning of the run, in which every neuron fires in every tile."""
    cfg = parse_config(configuration(Path("run"), "data", sparsity={"path": "sparse"}))
    layers, neurons = cfg.model.num_layers, cfg.model.ffn_hidden_size
    mlp = SimpleNamespace(
        layer_index=0, router=LayerRouter("sparse", neurons, cfg.model.hidden_size), recorder=LayerStats(neurons, "cpu")
    )
    state: Any = SimpleNamespace(mlps=[mlp])
    for neuron, tiles in ((5, 100), (7, 3)):
        mlp.recorder.tile_counts[neuron] += tiles
        route(cfg, state, LayerCounts([4.0] * layers, [0.5] * layers))
        assert mlp.router.order is not None
        assert int(mlp.router.order[0]) == neuron
