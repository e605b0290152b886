"""accelerate and restore: the same logits and text, one copy of the weights, and every way a model is used."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from megasparse.hf import accelerate, measure_sparsity, restore
from megasparse.hf.errors import AccelerateError
from megasparse.hf.inference_mlp import InferenceMLP
from megasparse.mlp import cuda
from megasparse.mlp.inference import NEVER, fewest_tokens
from tests.hf.cases import inputs
from tests.hf.test_from_hf import make_model

NAMES = ("llama-tied", "llama-wide-heads", "qwen2", "qwen3", "arcee", "apertus")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return sparser(make_model("llama-tied", tmp_path / "source"))


def sparser(model: Any) -> Any:
    """The last 8 of 48 neurons never fire."""
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            (mlp.gate_proj if hasattr(mlp, "gate_proj") else mlp.up_proj).weight[40:] = 0
    return model


@torch.inference_mode()
def logits(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    return model(inputs() if tokens is None else tokens).logits


def text(model: Any) -> torch.Tensor:
    return model.generate(
        inputs()[:, :5], attention_mask=torch.ones(4, 5), max_new_tokens=8, min_new_tokens=8, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


def mlps(model: Any) -> list[InferenceMLP]:
    return [module for module in model.modules() if isinstance(module, InferenceMLP)]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    model = sparser(make_model(name, tmp_path / "source"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted, wanted_text, wanted_one = logits(model), text(model), logits(model, inputs()[:1, :1])

    assert accelerate(model, path="sparse") is model
    assert len(mlps(model)) == 4
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, inputs()[:1, :1]), wanted_one, rtol=0, atol=1e-5)
    assert torch.equal(text(model), wanted_text)

    model.save_pretrained(tmp_path / "saved")
    assert list(model.state_dict()) == list(before)
    for state in (model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()):
        assert all(torch.equal(state[key], value) for key, value in before.items())

    assert restore(model) is model
    assert not mlps(model)
    assert list(model.state_dict()) == list(before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert value.is_contiguous(), key
    assert torch.equal(logits(model), wanted)


def test_the_sparse_path_runs_and_skips_inactive_neurons(model: Any) -> None:
    """What is not finite in the rows of neurons that never fire reaches the logits of the dense model alone."""
    accelerate(model, path="sparse")
    wanted = logits(model)
    with torch.no_grad():
        for mlp in mlps(model):
            mlp.up_proj.weight[40:] = torch.nan  # a view of what the kernels read
            mlp.down_proj.weight[:, 40:] = torch.nan
    assert torch.equal(logits(model), wanted)
    assert logits(restore(model)).isnan().all()


@pytest.mark.parametrize("name", ["llama-tied", "arcee"])
def test_weights_are_in_memory_once(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path / "source")

    def storages() -> dict[int, int]:
        tensors = [*model.parameters(), *model.buffers()]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    before = sum(storages().values())
    accelerate(model, path="sparse")
    assert sum(storages().values()) == before
    restore(model)
    assert sum(storages().values()) == before


def test_without_kernels_nothing_changes_and_one_notice_says_so(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    wanted, places = logits(model), [parameter.data_ptr() for parameter in model.parameters()]
    cuda.note_dense.cache_clear()  # other tests may have had the notice
    with caplog.at_level(logging.WARNING, "megasparse.mlp"):
        accelerate(model, sample=inputs())
    assert [record.getMessage() for record in caplog.records] == [
        "The sparse MLP runs its dense path: there are no kernels for cpu devices."
    ]
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("path", ["auto", "dense"])
def test_dense_paths_are_the_original(model: Any, path: Any) -> None:
    wanted = logits(model)
    assert torch.equal(logits(accelerate(model, path=path)), wanted)


def test_compiles_in_one_graph(model: Any) -> None:
    wanted = logits(model)
    accelerate(model, path="sparse")
    with torch.inference_mode():
        compiled = torch.compile(model.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 7, model.config.hidden_size)
        torch.testing.assert_close(compiled(x), model.model.layers[0].mlp.original(x))
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def test_moving_and_loading_keep_the_layout(model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    accelerate(model, path="sparse")
    for change in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.load_state_dict(other.state_dict(), assign=True),
        lambda: model.double().float(),
    ):
        change()
        for mlp in mlps(model):
            assert mlp.w_in is not None
            assert mlp.w_down is not None
            assert mlp.w_in.data_ptr() == mlp.gate_proj.weight.data_ptr()
            assert mlp.w_down.data_ptr() == mlp.down_proj.weight.data_ptr()
            assert torch.equal(mlp.w_in, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-5)
    for mlp in mlps(model):
        mlp.mode = "auto"
    model.double()  # as on a move to a device without kernels
    for mlp in mlps(model):
        assert mlp.w_in is mlp.w_down is None
        assert mlp.down_proj.weight.is_contiguous()
    for mlp in mlps(model):
        mlp.mode = "sparse"
    model.float()
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(restore(copied)), logits(model), rtol=0, atol=1e-5)


def test_gradients_come_from_the_original(model: Any) -> None:
    model(inputs()).logits.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    accelerate(model, path="sparse")
    model(inputs()).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_measured_sparsity_is_what_fires(model: Any) -> None:
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *hook: seen.append(hook[2] > 0))
    logits(model)
    wanted = [fired.flatten(0, 1) for fired in seen]
    found = measure_sparsity(accelerate(model, path="dense"), inputs())
    for layer, fired in zip(found, wanted, strict=True):
        assert layer.l0 == pytest.approx(float(fired.sum(1).float().mean()))
        assert layer.union_fraction == pytest.approx(float(fired.any(0).float().mean()))  # 96 tokens: one tile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mlp: setattr(mlp, "act_fn", nn.SiLU()), "layers.2.mlp: its activation is SiLU, not ReLU"),
        (lambda mlp: setattr(mlp.up_proj, "bias", nn.Parameter(torch.zeros(48))), "layers.2.mlp.up_proj: has a bias"),
        (
            lambda mlp: setattr(mlp, "down_proj", nn.Sequential(mlp.down_proj)),
            "layers.2.mlp.down_proj: is a Sequential, not a plain Linear",
        ),
        (lambda mlp: mlp.to("meta"), "layers.2.mlp.gate_proj: its weight is not whole on this process's devices"),
    ],
)
def test_what_cannot_be_accelerated_is_named_and_left_alone(model: Any, change: Any, message: str) -> None:
    change(model.model.layers[2].mlp)
    with pytest.raises(AccelerateError, match=message):
        accelerate(model)
    assert not mlps(model)


def test_mistakes(model: Any) -> None:
    with pytest.raises(AccelerateError, match="LlamaForCausalLM is not accelerated"):
        restore(model)
    with pytest.raises(AccelerateError, match="Linear has no MLP made of up_proj"):
        accelerate(nn.Linear(2, 2))
    accelerate(model)
    with pytest.raises(AccelerateError, match="is accelerated already"):
        accelerate(model)
    with pytest.raises(ValueError, match="path is 'fast'"):
        accelerate(model, path="fast")  # type: ignore[arg-type]


def test_limits_follow_the_statistics() -> None:
    quiet, usual, busy, full = (fewest_tokens(union, 2048, 5632) for union in (0.073, 0.298, 0.664, 1.0))
    assert quiet <= usual < busy < full == NEVER
    assert fewest_tokens(0.1, 512, 2048) > fewest_tokens(0.1, 8192, 28672), "small layers need more tokens"
