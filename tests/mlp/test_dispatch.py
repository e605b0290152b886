"""The router: cost model, hysteresis, order, capacity, state."""

import logging

import pytest
import torch

from megasparse.mlp import LayerRouter
from megasparse.mlp import dispatch as dispatch_module
from megasparse.mlp.dispatch import predicted_ratio

TOKENS, WIDTH, HIDDEN = 16384, 2048, 512


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> LayerRouter:
    """A router in auto mode as on a GPU with kernels: only the question whether they exist is answered here."""
    monkeypatch.setattr(dispatch_module, "device_reason", lambda *_: None)
    return LayerRouter("auto", HIDDEN, WIDTH, device="cuda", name="layer 3")


def test_cost_model_is_monotone_and_favours_order() -> None:
    shares = [i / 20 for i in range(21)]
    shape = (16384, 2048, 5632)
    for ordered in (True, False):
        ratios = [predicted_ratio(share, ordered, *shape) for share in shares]
        assert ratios == sorted(ratios)
    assert all(predicted_ratio(share, True, *shape) <= predicted_ratio(share, False, *shape) for share in shares)
    assert predicted_ratio(0.07, True, *shape) < 0.4  # mean L0 25 of 5632: more than 2.5 times faster
    assert predicted_ratio(1.0, True, *shape) > 1


def test_cost_model_counts_launches_against_small_layers() -> None:
    large, small = (predicted_ratio(0.7, True, tokens, 2048, 5632) for tokens in (16384, 2048))
    assert large < 0.9  # measured: 0.84 to 0.89
    assert small > 1.0  # measured: 1.07
    assert predicted_ratio(0.1, True, 0, 2048, 5632) > 1.0  # no tokens: nothing to gain


def test_changes_path_with_hysteresis(router: LayerRouter, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megasparse.mlp")
    counts = torch.arange(512)
    between = next(
        share
        for share in (i / 1000 for i in range(1000))
        if dispatch_module.ENTER_SPARSE
        < predicted_ratio(share, True, TOKENS, WIDTH, HIDDEN)
        < dispatch_module.LEAVE_SPARSE
    )
    assert router.path == "dense"
    router.update(20.0, between, counts, tokens=TOKENS)
    assert router.path == "dense"
    router.update(20.0, 0.1, counts, tokens=TOKENS)
    assert router.path == "sparse"
    router.update(20.0, between, counts, tokens=TOKENS)
    assert router.path == "sparse"
    router.update(200.0, 0.95, counts, tokens=TOKENS)
    assert router.path == "dense"
    assert "layer 3: dense -> sparse (L0 20.0, union 0.100 of 512 neurons" in caplog.text
    assert "layer 3: sparse -> dense" in caplog.text


def test_orders_by_frequency_with_ties_by_index(router: LayerRouter) -> None:
    counts = torch.zeros(512, dtype=torch.int32)
    counts[7], counts[300] = 5, 9
    router.update(3.0, 0.1, counts, tokens=TOKENS)
    assert router.order.dtype == torch.int32
    assert router.order[:4].tolist() == [300, 7, 0, 1]
    assert sorted(router.order.tolist()) == list(range(512))


def test_capacity_has_room_and_rarely_changes(router: LayerRouter) -> None:
    assert router.capacity(1000) is None
    router.update(60.0, 0.2, tokens=TOKENS)
    first = router.capacity(1000)
    assert first >= 1.5 * 60 * 1000
    router.update(45.0, 0.2, tokens=TOKENS)
    assert router.capacity(1000) == first
    router.update(5.0, 0.2, tokens=TOKENS)
    assert router.capacity(1000) < first
    router.update(512.0, 1.0, tokens=TOKENS)
    assert router.capacity(1000) == 512 * 1000


def test_not_a_number_changes_nothing(router: LayerRouter) -> None:
    router.update(20.0, 0.1, torch.arange(512), tokens=TOKENS)
    state = router.state_dict()
    router.update(float("nan"), float("nan"), tokens=TOKENS)
    assert router.path == "sparse"
    assert router.state_dict()["l0_bound"] == state["l0_bound"]


def test_state_continues_elsewhere(router: LayerRouter) -> None:
    router.update(20.0, 0.1, torch.arange(512), tokens=TOKENS)
    state = router.state_dict()
    other = LayerRouter("auto", HIDDEN, WIDTH, device="cuda")
    other.load_state_dict({**state, "order": None})
    assert (other.path, other.capacity(10)) == (router.path, router.capacity(10))
    other = LayerRouter("sparse", HIDDEN, WIDTH)
    other.load_state_dict(state)
    assert torch.equal(other.order, router.order)
    resharded = LayerRouter("auto", 256, 64, device="cuda")
    resharded.load_state_dict(state)
    assert resharded.order is None


def test_order_is_loaded_to_where_the_layer_computes(router: LayerRouter) -> None:
    router.update(20.0, 0.1, torch.arange(512), tokens=TOKENS)
    other = LayerRouter("sparse", HIDDEN, WIDTH, device="meta")
    other.load_state_dict(router.state_dict())
    assert other.order.device.type == "meta"


@pytest.mark.parametrize(("mode", "path"), [("auto", "dense"), ("dense", "dense"), ("sparse", "sparse")])
def test_fixed_modes_and_devices_without_kernels_keep_their_path(mode: str, path: str) -> None:
    router = LayerRouter(mode, 512, 64, device="cpu")
    for share in (0.01, 1.0):
        router.update(share * 512, share, torch.arange(512), tokens=TOKENS)
        assert router.path == path


def test_refuses_unknown_mode_and_wrong_counts() -> None:
    with pytest.raises(ValueError, match="'fast'"):
        LayerRouter("fast", 8, 8)
    with pytest.raises(ValueError, match=r"tile_counts must be \[8\]; got \(9,\)"):
        LayerRouter("auto", 8, 8).update(1.0, 0.1, torch.zeros(9), tokens=TOKENS)
