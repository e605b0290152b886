"""Accelerated models on a Hopper GPU: as exact as dense, in CUDA graphs and with a static cache too."""

from __future__ import annotations

import copy
from typing import Any

import torch

from megasparse.hf import accelerate, calibrate, restore
from megasparse.hf.inference_mlp import InferenceMLP
from tests.gpu import NEEDS_HOPPER

pytestmark = NEEDS_HOPPER


@torch.inference_mode()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def mlps(model: Any) -> list[InferenceMLP]:
    return [module for module in model.modules() if isinstance(module, InferenceMLP)]


def gpu_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=256, intermediate_size=1408, num_attention_heads=4, vocab_size=500,
        hidden_act="relu", max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def test_on_a_gpu_every_path_is_as_exact_as_dense() -> None:
    model = gpu_model()
    ids = torch.randint(500, (3, 200), device="cuda")
    reference = logits(copy.deepcopy(model).float(), ids)
    dense_error = (logits(model, ids) - reference).norm()
    one = ids[:, :1].contiguous()
    wanted_one = logits(copy.deepcopy(model).float(), one)
    dense_one = (logits(model, one) - wanted_one).norm()
    accelerate(model)
    assert all(mlp.sparse_from is None for mlp in mlps(model)), "nothing is known before the first forward"
    logits(model, ids)
    assert all(mlp.sparse_from is not None for mlp in mlps(model)), "600 tokens are enough to choose"
    calibrate(model, ids)
    for mlp in mlps(model):
        mlp.sparse_from = 65
    assert (logits(model, ids) - reference).norm() <= 1.2 * dense_error
    with torch.inference_mode():
        compiled = torch.compile(lambda tokens: model(tokens, use_cache=False).logits, mode="reduce-overhead")
        for tokens, wanted, error in ((ids, reference, dense_error), (one, wanted_one, dense_one)):
            for _ in range(3):  # the last replays a CUDA graph
                found = compiled(tokens).float()
            assert (found - wanted).norm() <= 1.2 * error
    before = logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    restore(model)
    assert (logits(model, ids) - reference).norm() == dense_error


def test_generates_with_a_static_cache_on_a_gpu() -> None:
    model = accelerate(gpu_model())
    ids = torch.randint(500, (2, 140), device="cuda")
    with torch.inference_mode():
        model(ids)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False,
            cache_implementation="static", pad_token_id=0,
        )  # fmt: skip
    assert found.shape == (2, 152)
