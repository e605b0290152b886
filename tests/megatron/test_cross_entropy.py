"""The cross entropy against fp64, over tensor-parallel ranks, in bf16 where probabilities are near one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasparse.megatron.cross_entropy import cross_entropy
from tests.launch import run_distributed

ROWS, VOCABULARY = 23, 96


def case(
    device: str = "cpu", rows: int = ROWS, width: int = VOCABULARY
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits fp32 with rows from flat to certain, an excluded last column; labels; gradient of the losses."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, width, generator=generator) * torch.linspace(0.1, 12, rows)[:, None]
    labels = torch.randint(width - 1, (rows,), generator=generator)
    labels[::2] = logits[::2, : width - 1].argmax(1)
    logits[:, -1] = -torch.inf
    grad = torch.rand(rows, generator=generator)
    grad[3] = 0.0
    return logits.to(device), labels.to(device), grad.to(device)


def exact(logits: torch.Tensor, labels: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    loss.backward(grad.double())
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def run(logits: torch.Tensor, labels: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of this rank's part."""
    group = dist.group.WORLD
    assert group is not None
    part = logits.chunk(group.size(), 1)[group.rank()].clone().requires_grad_()
    # As in a model: the logits are an intermediate tensor, which the backward may overwrite.
    loss = cross_entropy((part * 1).view(-1, 1, part.shape[1]), labels.view(-1, 1), group)
    loss.backward(grad.view(-1, 1))
    assert part.grad is not None
    return loss.detach().flatten(), part.grad


def parts(dtype: str) -> list[list[Any]]:
    logits, labels, grad = case()
    loss, gradient = run(logits.to(getattr(torch, dtype)), labels, grad)
    return [loss.tolist(), gradient.float().tolist()]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_and_gradient_over_tensor_parallel_ranks(ranks: int) -> None:
    logits, labels, grad = case()
    loss, gradient = exact(logits, labels, grad)
    results = run_distributed(ranks, "tests.megatron.test_cross_entropy:parts", "float32")
    for own, _ in results:
        assert own == pytest.approx(loss.tolist(), rel=1e-5, abs=2e-6)
    whole = torch.cat([torch.tensor(own) for _, own in results], 1)
    assert torch.allclose(whole.double(), gradient, atol=1e-6)


def check_bf16(loss: torch.Tensor, gradient: torch.Tensor, logits: torch.Tensor, *rest: torch.Tensor) -> None:
    """One rounding to bf16: every entry within 2^-8 of its own size, also those of certain tokens."""
    expected, exact_gradient = exact(logits, *rest)
    assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=2e-6)
    # Beside the rounding, p - 1 carries fp32's error of p.
    assert torch.all((gradient.double() - exact_gradient).abs() <= 2**-8 * exact_gradient.abs() + 3e-6)


def test_bf16_rounds_once() -> None:
    logits, labels, grad = case()
    rounded = logits.bfloat16()
    ((loss, gradient),) = run_distributed(1, "tests.megatron.test_cross_entropy:parts", "bfloat16")
    check_bf16(torch.tensor(loss), torch.tensor(gradient), rounded, labels, grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("rows", "width"), [(23, 96), (300, 49152), (65, 12289)])
def test_kernels(rows: int, width: int) -> None:
    from megasparse.megatron.cross_entropy import _row_statistics, _write_gradient

    logits, labels, grad = case("cuda", rows, width)
    own = logits.bfloat16()
    rounded = own.clone()
    maximum, total, target = _row_statistics(own, labels)
    normaliser = maximum + total.log()
    _write_gradient(own, labels, normaliser, grad)
    check_bf16(normaliser - target, own, rounded, labels, grad)
    # Another rank's label changes nothing but the one it takes away.
    other = rounded.clone()
    assert torch.equal(_row_statistics(other, labels - width)[2], torch.zeros(rows, device="cuda"))
    _write_gradient(other, labels - width, normaliser, grad)
    elsewhere = torch.arange(width, device="cuda")[None, :] != labels[:, None]
    assert torch.equal(other[elsewhere], own[elsewhere])


def twice(_: str) -> str:
    logits, labels, grad = case()
    group = dist.group.WORLD
    assert group is not None
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf * 1, labels, group)
    loss.backward(grad, retain_graph=True)
    try:
        loss.backward(grad)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_second_backward_is_refused() -> None:
    (message,) = run_distributed(1, "tests.megatron.test_cross_entropy:twice", "")
    assert "cannot run twice" in message
