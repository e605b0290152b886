"""Tiles along sequences: both paths on [s, b, D] do what they do on the same tokens sequence after sequence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse.mlp import MainGrads, MLPOutput, sparse_mlp
from tests.mlp.patterns import Case, interleaved, make_case, rows_of_tokens

HIDDEN = 70
SIZES = [(256, 2), (768, 2), (1024, 8)]
"""Tokens and sequences: of one tile, of several, and more of them."""


def run(case: Case, path: str, **options: Any) -> tuple[MLPOutput, list[Tensor]]:
    x, w_in, w_down = (tensor.detach().clone().requires_grad_() for tensor in case[:3])
    out = sparse_mlp(x, w_in, w_down, path=path, **options)
    return out, list(torch.autograd.grad((out.y * case.dy).sum() + 0.1 * out.l1, (x, w_in, w_down)))


def options_of(tokens: int, sequences: int, full: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same options for tokens sequence after sequence and for rows position after position."""
    if not full:
        return {}, {"sequences": sequences}
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(tokens, generator=generator) > 0.3
    of_rows = torch.empty_like(mask)
    of_rows[rows_of_tokens(tokens, sequences)] = mask
    return {"token_mask": mask}, {"token_mask": of_rows, "sequences": sequences}


@pytest.mark.parametrize("full", [False, True], ids=["plain", "masked, ordered, overflowing"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("tokens", "sequences"), SIZES)
def test_sparse_path_is_that_of_the_tokens_by_sequence_bit_for_bit(
    tokens: int, sequences: int, gated: bool, full: bool
) -> None:
    case = make_case(tokens, 24, HIDDEN, gated, "sparse").to(torch.bfloat16)
    rows = rows_of_tokens(tokens, sequences)
    plain, tiled = options_of(tokens, sequences, full)
    more = {"order": torch.arange(HIDDEN, dtype=torch.int32).flip(0), "capacity": 17} if full else {}
    expected, (dx, *dw) = run(case, "sparse", **plain, **more)
    out, (dx_rows, *dw_rows) = run(interleaved(case, sequences), "sparse", **tiled, **more)
    assert torch.equal(out.y[rows], expected.y)
    assert torch.equal(dx_rows[rows], dx)
    assert torch.equal(out.l1, expected.l1)
    for a, b in zip([*dw_rows, *out.stats], [*dw, *expected.stats], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "sequences"), SIZES)
def test_dense_path_counts_over_the_same_tiles(tokens: int, sequences: int, masked: bool) -> None:
    case = make_case(tokens, 24, HIDDEN, True, "alternating_tiles")
    plain, tiled = options_of(tokens, sequences, masked)
    expected, _ = run(case, "dense", **plain)
    rows = interleaved(case, sequences)
    out, gradients = run(rows, "dense", **tiled)
    for a, b in zip(out.stats, expected.stats, strict=True):
        assert torch.equal(a, b)
    along_rows, others = run(rows, "dense", **{**tiled, "sequences": 1})
    assert along_rows.stats.union > out.stats.union
    for a, b in zip([out.y, out.l1, *gradients], [along_rows.y, along_rows.l1, *others], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("tokens", [0, 200, 320])
def test_tiles_follow_the_rows_where_one_would_span_two_sequences(path: str, tokens: int) -> None:
    case = make_case(tokens, 24, HIDDEN, True, "alternating_tiles")
    (out, gradients), (expected, wanted) = run(case, path, sequences=2), run(case, path)
    for a, b in zip(
        [out.y, out.l1, *out.stats, *gradients], [expected.y, expected.l1, *expected.stats, *wanted], strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_main_gradients(path: str) -> None:
    case = interleaved(make_case(256, 24, HIDDEN, True, "sparse"), 2)
    _, (dx, dw_in, dw_down) = run(case, path)
    main = MainGrads(torch.zeros_like(case.w_in), torch.zeros_like(case.w_down))
    x, w_in, w_down = (tensor.clone().requires_grad_() for tensor in case[:3])
    out = sparse_mlp(x, w_in, w_down, path=path, sequences=2, main_grads=main)
    ((out.y * case.dy).sum() + 0.1 * out.l1).backward()
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(main.w_in, dw_in)
    torch.testing.assert_close(main.w_down, dw_down)
