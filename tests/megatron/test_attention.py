"""Core attention against the formula, and context parallelism with a document mask against none."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megasparse.megatron.attention import SDPAttention
from megasparse.megatron.model import transformer_config
from tests.megatron.helpers import assert_close, run_gradients
from tests.megatron.tiny_model import SEQUENCE, document_mask, make_config


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(forbidden, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(2)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", ["causal", "documents", "last queries", "none"])
def test_against_the_formula(mask: str, groups: int) -> None:
    torch.manual_seed(0)
    queries = 5 if mask == "last queries" else SEQUENCE
    q = torch.randn(queries, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(SEQUENCE, 2, groups, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ahead = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    forbidden = {
        "causal": ahead,
        "documents": document_mask(),
        "last queries": ahead[-queries:],
        "none": torch.zeros_like(ahead),
    }[mask]
    config = transformer_config(make_config())
    kind = AttnMaskType.no_mask if mask == "none" else AttnMaskType.causal
    attention = SDPAttention(config, 1, kind, "self")
    given = forbidden[None, None] if mask == "documents" else None
    actual = attention(q, k, v, given)
    expected = naive(q, k, v, forbidden)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad((actual * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_scaling_by_layer_changes_nothing() -> None:
    """Megatron-LM's --apply-query-key-layer-scaling: another order of the same products."""
    config = dataclasses.replace(transformer_config(make_config()), apply_query_key_layer_scaling=True)
    attention = SDPAttention(config, 3, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(SEQUENCE, 2, 4, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    ahead = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    torch.testing.assert_close(attention(q, k, v, None), naive(q, k, v, ahead))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("groups", [16, 4])
def test_a_document_mask_costs_no_matrix_of_scores(groups: int) -> None:
    tokens, heads = 4096, 16
    attention = SDPAttention(transformer_config(make_config()), 1, AttnMaskType.causal, "self")
    place = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.randn(tokens, 1, heads, 64, **place)
    k, v = (torch.randn(tokens, 1, groups, 64, **place) for _ in range(2))
    forbidden = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").triu(1)[None, None]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, forbidden).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * tokens**2 * 2 / 3  # a third of the scores in bf16


@pytest.mark.parametrize("mask", ["documents", "last queries"])
def test_layers_keep_one_mask_for_their_backward(mask: str) -> None:
    queries = 5 if mask == "last queries" else SEQUENCE
    given = document_mask()[None, None] if mask == "documents" else None
    attention = SDPAttention(transformer_config(make_config()), 1, AttnMaskType.causal, "self")
    q, k, v = (torch.randn(n, 2, 4, 8, requires_grad=True) for n in (queries, SEQUENCE, SEQUENCE))
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (queries, SEQUENCE):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first, second = attention(q, k, v, given), attention(q, k, v, given)
    assert len(kept) == 1
    assert torch.equal(first, second)
    if given is not None:  # what was made of it is not used when it has changed
        given.copy_(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1))
        torch.testing.assert_close(attention(q, k, v, given), attention(q, k, v, None))


def test_refuses_what_it_does_not_do() -> None:
    attention = SDPAttention(transformer_config(make_config()), 1, AttnMaskType.causal, "self")
    q = torch.zeros(4, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="Transformer Engine"):
        attention(q, q, q, None, attention_bias=torch.zeros(1))
    changes: list[dict[str, Any]] = [{"window_size": (4, 0)}, {"softmax_type": "off-by-one"}]
    for change in changes:
        config = dataclasses.replace(transformer_config(make_config()), **change)
        with pytest.raises(NotImplementedError, match="Transformer Engine"):
            SDPAttention(config, 1, AttnMaskType.causal, "self")


@pytest.mark.parametrize("layout", ["cp2", "tp2-sp-pp2"])
def test_document_mask_under_parallelism(layout: str) -> None:
    loss, gradients = run_gradients(layout, {"coeff": 1e-2}, {"documents": True})
    expected_loss, expected = run_gradients("one", {"coeff": 1e-2}, {"documents": True})
    causal_loss, _ = run_gradients("one", {"coeff": 1e-2})
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert abs(causal_loss - expected_loss) > 1e-3
    assert_close(gradients, expected, 2e-5)
