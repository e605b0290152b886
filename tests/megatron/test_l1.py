"""The L1 term's gradient, alone, against the term written into the loss of a dense model and left to autograd."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.launch import run_distributed
from tests.megatron.helpers import LAYOUTS, assert_close, run_gradients
from tests.megatron.tiny_model import Arrays

COEFF = [1e-2, 3e-3, 2e-2, 5e-3]  # one for each layer: none may take another's
TOLERANCE = 1e-5


@cache
def oracle(masked: bool, gated: bool = True) -> tuple[Arrays, list[dict[str, Any]]]:
    config = {"model__gated": gated}
    ((shards, layers),) = run_distributed(1, "tests.megatron.cases:oracle", config, COEFF, masked)
    return {name: values for name, values, *_ in shards}, layers


def check(
    layout: str,
    *,
    masked: bool,
    model: dict[str, Any] | None = None,
    gated: bool = True,
    scale: float = 1.0,
    **config: Any,
) -> None:
    model = {"coeff": COEFF, **(model or {})}
    step = {"masked": masked, "cross_entropy": 0.0}
    _, gradients = run_gradients(layout, model, step, model__gated=gated, **config)
    expected, _ = oracle(masked, gated)
    assert_close({name: value / scale for name, value in gradients.items()}, expected, TOLERANCE)


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_layout(layout: str, masked: bool) -> None:
    check(layout, masked=masked)


@pytest.mark.parametrize("layout", ["one", "tp2-sp"])
def test_not_gated(layout: str) -> None:
    check(layout, masked=True, gated=False)


def test_sparse_path() -> None:
    check("tp2-sp", masked=True, sparsity__path="sparse")


@pytest.mark.parametrize("size", [2, 4])
def test_micro_batch_size(size: int) -> None:
    check("one", masked=True, training__micro_batch_size=size)


RECOMPUTE = {
    "full": {"training__recompute": "full"},
    "full, some layers": {"training__recompute": "full", "training__recompute_layers": 1},
    "mlp": {"training__recompute": "selective", "training__recompute_modules": ["mlp"]},
    "attention": {"training__recompute": "selective", "training__recompute_modules": ["core_attn"]},
}


@pytest.mark.parametrize("layout", ["one", "tp2-sp-pp2"])
@pytest.mark.parametrize("recompute", list(RECOMPUTE))
def test_recomputation(recompute: str, layout: str) -> None:
    check(layout, masked=True, **RECOMPUTE[recompute])


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "pp2", "cp2", "dp2"])
def test_mean_over_micro_batches_instead_of_tokens(layout: str) -> None:
    check(layout, masked=False, model={"per_token": False})


@pytest.mark.parametrize("per_token", [True, False])
def test_loss_scale(per_token: bool) -> None:
    check("one", masked=False, model={"per_token": per_token, "loss_scale": 64.0}, scale=64.0)


@pytest.mark.parametrize("layout", ["one", "tp2-sp-pp2", "cp2", "dp2", "pp2-interleaved"])
@pytest.mark.parametrize("recompute", ["none", "full", "mlp"])
def test_statistics_count_every_token_once(layout: str, recompute: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = {**parallel, **(RECOMPUTE[recompute] if recompute != "none" else {})}
    _check_statistics(ranks, parallel, config, {"masked": True}, eval_mode=False, no_grad=False)


@pytest.mark.parametrize("layout", ["one", "tp2-sp-pp2"])
@pytest.mark.parametrize("recompute", ["none", "mlp"])
@pytest.mark.parametrize("no_grad", [True, False])
def test_statistics_of_validation(layout: str, recompute: str, no_grad: bool) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = {**parallel, **(RECOMPUTE[recompute] if recompute != "none" else {})}
    _check_statistics(ranks, parallel, config, {"masked": True, "forward_only": True}, eval_mode=True, no_grad=no_grad)


def _check_statistics(
    ranks: int, parallel: dict[str, Any], config: dict[str, Any], step: dict[str, Any], eval_mode: bool, no_grad: bool
) -> None:
    target = "tests.megatron.cases:statistics"
    results = run_distributed(ranks, target, config, {"coeff": COEFF}, step, eval_mode, no_grad)
    _, expected = oracle(masked=True)
    tensor = parallel.get("parallel__tensor", 1)
    for index, want in enumerate(expected):
        found = [(rank, sums) for result in results for layer, rank, sums in result if layer == index]
        assert sum(sums["tokens"] for _, sums in found) == want["tokens"] * tensor
        assert sum(sums["active"] for _, sums in found) == want["active"]
        assert sum(sums["l1"] for _, sums in found) == pytest.approx(want["l1"], rel=1e-5)
        shards = [np.any([s["fired"] for rank, s in found if rank == part], axis=0) for part in range(tensor)]
        np.testing.assert_array_equal(np.concatenate(shards), want["fired"] & (not eval_mode))
