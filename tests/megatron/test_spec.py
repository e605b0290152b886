"""What the specs and the module accept and refuse, and the `-` layer of hybrid models."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer

from megasparse.config import ConfigError
from megasparse.megatron import layer_spec, spec, transformer_config
from megasparse.megatron.norm import Norm
from megasparse.megatron.sparse_mlp import SparseMLP, _check
from tests.launch import run_distributed
from tests.megatron.helpers import LAYOUTS, run_gradients
from tests.megatron.tiny_model import dense_mlp, make_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_func": F.tanh}, "not torch.nn.functional.relu"),
        ({"add_bias_linear": True}, "--disable-bias-linear"),
        ({"activation_func_clamp_value": 1.0}, "activation_func_clamp_value"),
        ({"fp4": "e2m1"}, "fp4 is on"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl local captures the MLP too"),
        ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "attn,mlp"}, "captures the MLP too"),
        ({"enable_autocast": True, "autocast_dtype": torch.bfloat16}, "enable_autocast is on with torch.bfloat16"),
        (
            {"fp8": "hybrid", "recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            "recompute_modules has mlp",
        ),
        ({"ffn_hidden_size": 47}, "47 is not divisible by the tensor-parallel size 2"),
    ],
)
def test_refuses_other_mlps(change: dict[str, Any], message: str) -> None:
    config = transformer_config(make_config())
    if hasattr(config, "inference_cuda_graph_scope"):  # from Megatron-Core 0.19 on; follows from the kind of graphs
        change = {**change, "inference_cuda_graph_scope": None}
    config = dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match=message):
        _check(config, config.ffn_hidden_size, 2, is_expert=False)


def test_refuses_parts_of_a_sequence() -> None:
    config: Any = transformer_config(make_config())
    config.mlp_chunks_for_training = 2  # a field of Megatron-Core 0.19's
    with pytest.raises(ValueError, match="mlp_chunks_for_training is 2"):
        _check(config, config.ffn_hidden_size, 2, is_expert=False)


def test_graphs_of_megatron_that_leave_it_out_are_accepted() -> None:
    change = {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "attn"}
    config = dataclasses.replace(transformer_config(make_config()), **change)
    _check(config, config.ffn_hidden_size, 2, is_expert=False)


@pytest.mark.parametrize(
    ("changes", "norm", "message"),
    [
        ({}, False, None),
        ({"qk_layernorm": True}, False, r"layer_spec\(qk_norm=True\)"),
        ({"qk_layernorm": True}, True, None),
        ({"qk_l2_norm": True}, False, "--qk-l2-norm"),
        ({"qk_l2_norm": True}, True, "--qk-l2-norm"),
        ({"multi_latent_attention": True}, False, "--multi-latent-attention"),
        ({"num_moe_experts": 4}, False, "layer 1 is one with experts"),
        ({"num_moe_experts": 4, "moe_layer_freq": 2}, False, None),
        ({"num_moe_experts": 4, "moe_layer_freq": [0, 1]}, False, "layer 1 is one with experts"),
    ],
)
def test_a_layer_refuses_what_its_spec_lacks(changes: dict[str, Any], norm: bool, message: str | None) -> None:
    [found] = run_distributed(1, "tests.megatron.cases:second_layer", changes, norm)
    if message is None:
        assert found == "built"
    else:
        assert re.search(message, found)


def test_spec_for_megatron_lm() -> None:
    """What `--spec megasparse.megatron.spec gpt_layer` looks up."""
    chosen = vars(spec)["gpt_layer"]
    assert issubclass(chosen.module, TransformerLayer)
    assert chosen.submodules.mlp.module is SparseMLP
    assert layer_spec("local", mlp=dense_mlp()).submodules.mlp.module is not SparseMLP


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_transformer_engine_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match="Transformer Engine, which cannot be used here") as alone:
        layer_spec("te")
    cfg = make_config(
        model__implementation="te", training__recompute="selective", training__recompute_modules=["layernorm", "mlp"]
    )
    with pytest.raises(ConfigError) as found:
        transformer_config(cfg)
    assert [problem.key for problem in found.value.problems] == ["model.implementation", "training.recompute_modules"]
    assert found.value.problems[0] == alone.value.problems[0]
    assert found.value.host_specific


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_fp8_is_refused_where_it_cannot_run() -> None:
    cfg = make_config(training__precision="bf16", training__fp8="hybrid")
    with pytest.raises(ConfigError, match="delayed scaling needs Transformer Engine") as found:
        transformer_config(cfg)
    assert found.value.host_specific
    assert "set training.fp8: off" in str(found.value)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_beside_it_changes_nothing(recipe: str) -> None:
    """Megatron-LM's --fp8-format; on a GPU, inside Transformer Engine's context: test_fp8."""
    ((without, within),) = run_distributed(1, "tests.megatron.cases:mlp_beside_fp8", recipe)
    for name, value in without.items():
        np.testing.assert_array_equal(within[name], value, err_msg=name)


def test_norm_names_what_it_cannot_build() -> None:
    config = transformer_config(make_config())
    with pytest.raises(ValueError, match="L2Norm"):
        Norm(dataclasses.replace(config, normalization="L2Norm"), 8)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("layout", ["one", "tp2-sp"])
def test_tiles_follow_sequences(layout: str, path: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    for union, tiles, hidden in run_distributed(
        ranks, "tests.megatron.cases:tile_unions", {**parallel, "sparsity__path": path}
    ):
        assert tiles == 4
        assert union == 4 * hidden // 2


def test_padding_mask_of_a_wrong_shape() -> None:
    with pytest.raises(AssertionError, match="padding_mask"):
        run_distributed(1, "tests.megatron.cases:wrong_mask")


@pytest.mark.parametrize(("offset", "fused"), [(0, True), (6, True), (1, False)])
def test_main_gradients_that_the_kernels_cannot_write_are_left_to_autograd(offset: int, fused: bool) -> None:
    (found,) = run_distributed(1, "tests.megatron.cases:where_gradients_go", offset)
    assert found == [(fused, not fused)] * 2


def test_main_gradients_of_fsdp_are_left_to_it() -> None:
    """It has given `main_grad` of the last micro-batch away, or will have before the backward of this one."""
    (found,) = run_distributed(1, "tests.megatron.cases:where_gradients_go", 0, True)
    assert found == [(False, True)] * 2


def test_hybrid_mlp_layer_averages_over_its_own_kind() -> None:
    ((one, total),) = run_distributed(1, "tests.megatron.cases:hybrid_mlp_layer", 1, 1e-2)
    ((four, same),) = run_distributed(1, "tests.megatron.cases:hybrid_mlp_layer", 4, 1e-2)
    assert total == pytest.approx(same)
    assert total > 0
    assert one == pytest.approx(4 * four, rel=1e-5)


def test_l1_without_the_number_of_micro_batches() -> None:
    with pytest.raises(AssertionError, match="calculate_per_token_loss"):
        run_distributed(1, "tests.megatron.cases:no_micro_batches")


def test_learned_weights_differ_from_no_l1() -> None:
    _, with_l1 = run_gradients("one", {"coeff": 1.0})
    _, without = run_gradients("one")
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert abs(with_l1[name] - without[name]).max() > 1e-3
