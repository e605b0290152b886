"""Given the same weights and no L1 term, the sparse MLP is Megatron's own dense MLP."""

import pytest

from tests.launch import run_distributed
from tests.megatron.helpers import assert_close, run_gradients


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "non-gated"])
@pytest.mark.parametrize("layout", ["one", "tp2", "tp2-sp"])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_same_loss_and_gradients_as_megatrons_mlp(layout: str, gated: bool, path: str) -> None:
    config = {"model__gated": gated, "sparsity__path": path}
    loss, gradients = run_gradients(layout, **config)
    expected_loss, expected = run_gradients(layout, {"dense": True}, **config)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(gradients, expected, 2e-5)


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "pp2-interleaved", "cp2", "dp2", "tp2-sp-pp2"])
def test_layout_changes_nothing(layout: str) -> None:
    """Cross entropy and L1 together, bias on queries, keys and values, norms of queries and keys, untied embeddings."""
    model = {"coeff": 1e-2}
    config = {"model__qkv_bias": True, "model__qk_norm": True, "model__tie_embeddings": False}
    loss, gradients = run_gradients(layout, model, {"masked": True}, **config)
    expected_loss, expected = run_gradients("one", model, {"masked": True}, **config)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradients, expected, 2e-5)


def test_layer_norm_and_llama3_rope_scaling_under_pipeline() -> None:
    scaling = {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
    config = {
        "model__normalization": "layernorm",
        "model__rope_scaling": {**scaling, "original_max_position_embeddings": 8},
    }
    loss, gradients = run_gradients("tp2-sp-pp2", **config)
    expected_loss, expected = run_gradients("one", **config)
    plain_loss, _ = run_gradients("one", model__normalization="layernorm")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert abs(expected_loss - plain_loss) > 1e-4, "scaling the frequencies must change something"
    assert_close(gradients, expected, 2e-5)


def test_gradients_overlapped_with_their_reduction() -> None:
    _, gradients = run_gradients("dp2", {"coeff": 1e-2, "overlap": True})
    _, expected = run_gradients("one", {"coeff": 1e-2})
    assert_close(gradients, expected, 2e-5)


def test_parameters_gathered_beside_the_forward_pass() -> None:
    """The distributed optimizer leaves it to each module's forward to wait for the weights of that module."""
    trained = [
        run_distributed(
            2, "tests.megatron.cases:train", {"parallel__distributed_optimizer": True}, {"overlap": True, **model},
            [0, 1, 2],
        )[0]
        for model in ({}, {"gather": True})
    ]  # fmt: skip
    for plain, gathered in zip(trained[0][:2], trained[1][:2], strict=True):  # losses, gradient norms
        assert gathered == pytest.approx(plain, rel=1e-6)
