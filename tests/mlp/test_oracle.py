"""Both paths against autograd in fp64: outputs, all gradients, the L1 term and every statistic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.mlp import MainGrads, MLPOutput, sparse_mlp
from tests.mlp.patterns import PATTERNS, Case, make_case, reference, relative_error

L1_WEIGHT = 0.37


def run(
    case: Case, path: str, token_mask: torch.Tensor | None = None, **options: object
) -> tuple[MLPOutput, list[torch.Tensor]]:
    x, w_in, w_down = (tensor.detach().clone().requires_grad_() for tensor in case[:3])
    out = sparse_mlp(x, w_in, w_down, token_mask=token_mask, path=path, **options)
    ((out.y * case.dy).sum() + L1_WEIGHT * out.l1).backward()
    return out, [x.grad, w_in.grad, w_down.grad]


@pytest.mark.parametrize("path", ["dense", "sparse"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matches_fp64_autograd(path: str, data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from([0, 1, 2, 127, 128, 129, 300]) | st.integers(0, 400), "tokens")
    hidden = data.draw(st.sampled_from([1, 63, 64, 65, 128]) | st.integers(1, 200), "hidden")
    width = data.draw(st.integers(1, 40), "width")
    case = make_case(tokens, width, hidden, data.draw(st.booleans(), "gated"), data.draw(st.sampled_from(PATTERNS)))
    generator = torch.Generator().manual_seed(1)
    masked = data.draw(st.booleans(), "masked")
    token_mask = torch.rand(tokens, generator=generator) > 0.3 if masked else None
    options: dict[str, object] = {}
    if data.draw(st.booleans(), "ordered"):
        options["order"] = torch.randperm(hidden, generator=generator).int()
    options["capacity"] = data.draw(st.sampled_from([None, 0, 17, tokens * hidden]), "capacity")

    out, gradients = run(case, path, token_mask, **options)
    wanted = reference(case, L1_WEIGHT, token_mask)

    for value, expected in zip([out.y, out.l1, *gradients], wanted[:5], strict=True):
        torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=1e-10)
    counted = wanted.active if token_mask is None else wanted.active[token_mask]
    in_tiles = [tile.any(0) for tile in (wanted.active.split(128) if tokens else [])]
    assert out.stats.tokens == counted.shape[0]
    assert out.stats.active == counted.sum()
    assert torch.equal(out.stats.fired, counted.any(0))
    assert out.stats.tiles == len(in_tiles)
    assert out.stats.union == sum(int(tile.sum()) for tile in in_tiles)
    tile_counts = torch.stack(in_tiles).sum(0) if in_tiles else torch.zeros(hidden)
    assert torch.equal(out.stats.tile_counts, tile_counts.int())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_paths_agree_in_bf16_with_the_same_error(pattern: str, gated: bool) -> None:
    case = make_case(200, 48, 96, gated, pattern).to(torch.bfloat16)
    wanted = reference(case, L1_WEIGHT)
    dense, dense_gradients = run(case, "dense")
    sparse, sparse_gradients = run(case, "sparse")
    for a, b, expected in zip(
        [dense.y, dense.l1, *dense_gradients], [sparse.y, sparse.l1, *sparse_gradients], wanted[:5], strict=True
    ):
        dense_error, sparse_error = relative_error(a.detach(), expected), relative_error(b.detach(), expected)
        assert dense_error < 0.02
        assert sparse_error <= 1.1 * dense_error + 1e-4
    assert torch.equal(dense.stats.fired, sparse.stats.fired)
    assert dense.stats.active == sparse.stats.active


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_gradients_accumulate(path: str, dtype: torch.dtype) -> None:
    case = make_case(150, 24, 70, True, "sparse").to(dtype)
    _, (dx, dw_in, dw_down) = run(case, path)
    x, w_in, w_down = (tensor.clone().requires_grad_() for tensor in case[:3])
    main = MainGrads(torch.ones(w_in.shape), torch.full(w_down.shape, 2.0))
    out = [sparse_mlp(x, w_in, w_down, path=path, main_grads=main) for _ in range(2)]  # two forwards, two backwards
    for each in out:
        ((each.y * case.dy).sum() + L1_WEIGHT * each.l1).backward()
    assert w_in.grad is None
    assert w_down.grad is None
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(x.grad, 2 * dx, **tolerance)
    torch.testing.assert_close(main.w_in, 1 + 2 * dw_in.float(), **tolerance)
    torch.testing.assert_close(main.w_down, 2 + 2 * dw_down.float(), **tolerance)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_nan_and_infinity_reach_output_and_gradients(path: str) -> None:
    case = make_case(140, 16, 40, True, "sparse")
    case.x[3, 5] = torch.nan
    case.x[130, 5] = torch.inf
    out, (dx, dw_in, dw_down) = run(case, path)
    assert out.y[3].isnan().all()
    assert not out.y[130].isfinite().any()
    finite = torch.ones(140, dtype=torch.bool)
    finite[[3, 130]] = False
    assert out.y[finite].isfinite().all()
    assert dx[3].isnan().all()
    assert dw_in.isnan().all()
    assert dw_down.isnan().all()
    assert out.stats.active >= 40  # every neuron counts as active for the NaN token


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_unused_outputs_need_no_gradient(path: str) -> None:
    case = make_case(30, 8, 20, True, "random")
    x, w_in, w_down = (tensor.clone().requires_grad_() for tensor in case[:3])
    sparse_mlp(x, w_in, w_down, path=path).l1.backward()
    only_l1 = reference(case._replace(dy=torch.zeros_like(case.dy)), 1.0)
    torch.testing.assert_close(w_in.grad, only_l1.dw_in)
    assert not w_down.grad.any()
