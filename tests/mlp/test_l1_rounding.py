"""The L1 gradient in bf16, where it is far less than half an ulp of the gradient it is added to, arrives on average."""

import pytest
import torch

from megasparse.mlp import sparse_mlp
from tests.mlp.patterns import Case, reference

TOKENS, HIDDEN = 512, 512
DH, L1_WEIGHT = 1e-2, 2.5e-6
"""Standard deviation of dh, and the L1 term's coefficient over the number of layers, as in training."""


def make_exposing_case(gated: bool, device: str) -> Case:
    """bf16. x is the identity: dw_in is the gradient of the pre-activation, transposed and not rounded again."""
    generator = torch.Generator().manual_seed(0)
    w_in, w_down, dy = (
        torch.randn(rows, TOKENS, dtype=torch.float64, generator=generator)
        for rows in (2 * HIDDEN if gated else HIDDEN, HIDDEN, TOKENS)
    )
    return Case(torch.eye(TOKENS), w_in, w_down / TOKENS**0.5, dy * DH).to(torch.bfloat16, device)


def gradient(case: Case, path: str, l1_weight: float, token_mask: torch.Tensor) -> torch.Tensor:
    """dw_in in fp64; the sparse path with buffers that hold all values."""
    x, w_in, w_down = (tensor.clone().requires_grad_() for tensor in case[:3])
    out = sparse_mlp(x, w_in, w_down, token_mask=token_mask, path=path, capacity=TOKENS * HIDDEN)
    torch.autograd.backward([out.y, out.l1], [case.dy, torch.tensor(l1_weight, device=x.device)])
    return w_in.grad.double()


def check(path: str, gated: bool, device: str) -> None:
    case = make_exposing_case(gated, device)
    token_mask = torch.arange(TOKENS, device=device) % 4 > 0
    arrived = gradient(case, path, L1_WEIGHT, token_mask) - gradient(case, path, 0.0, token_mask)
    wanted = reference(case, L1_WEIGHT, token_mask).dw_in - reference(case, 0.0, token_mask).dw_in
    assert not arrived[:, ~token_mask].any()
    # One in twenty of the 10^5 elements or so moves, by an ulp: the standard deviation of the share is about 0.02.
    share = float((arrived * wanted).sum() / wanted.square().sum())
    assert abs(share - 1) < 0.1, f"{share:.3f} of the L1 gradient arrives"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_l1_gradient_arrives(path: str, gated: bool) -> None:
    check(path, gated, "cpu")
