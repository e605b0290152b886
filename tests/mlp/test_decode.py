"""The decode kernels on a GPU: against fp64 as the dense path is, on every pattern, in graphs and compiled."""

import pytest
import torch

from megasparse.mlp import decode, sparse_mlp
from megasparse.mlp.inference import NEVER, Route
from tests.mlp.patterns import PATTERNS, Case, make_case

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def case(tokens: int, width: int, hidden: int, gated: bool, pattern: str) -> Case:
    return make_case(tokens, width, hidden, gated, pattern).to(torch.bfloat16, "cuda")


def check(found: torch.Tensor, made: Case) -> None:
    """No further from fp64 than the dense bf16 path, up to rounding."""
    with torch.no_grad():
        wanted = sparse_mlp(*(tensor.double() for tensor in made[:3])).y
        dense = sparse_mlp(*made[:3]).y
    dense_error, error = ((value.double() - wanted).norm() for value in (dense, found))
    assert float(error) <= 1.05 * float(dense_error) + 2e-4 * float(wanted.norm()) + 1e-30
    worst = float((found.double() - wanted).abs().max())
    assert worst <= 1.5 * float((dense.double() - wanted).abs().max()) + 1e-3 * float(wanted.abs().max()) + 1e-30


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_adversarial_patterns(pattern: str, gated: bool) -> None:
    for tokens in (1, 5, 17, 33, 64):
        made = case(tokens, 264, 1408, gated, pattern)
        check(decode.decode_mlp(*made[:3]), made)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("width", "hidden"), [(8, 1), (64, 130), (2048, 5632), (2056, 5640), (8192, 28672)])
def test_sizes(width: int, hidden: int) -> None:
    for tokens in (1, 16, 64):
        made = case(tokens, width, hidden, True, "sparse")
        check(decode.decode_mlp(*made[:3]), made)


@pytest.mark.gpu
@needs_gpu
def test_rows_of_inactive_neurons_are_not_read() -> None:
    made = case(9, 264, 1408, True, "sparse")
    with torch.no_grad():
        idle = ~(made.x @ made.w_in[:1408].t() > 0).any(0)
    assert idle.any()
    wanted = decode.decode_mlp(*made[:3])
    w_in, w_down = made.w_in.clone(), made.w_down.clone()
    w_in[1408:][idle] = torch.nan
    w_down[idle] = torch.nan
    assert torch.equal(decode.decode_mlp(made.x, w_in, w_down), wanted)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 64])
def test_graph_and_compiled_give_the_same_bits(tokens: int) -> None:
    made = case(tokens, 512, 1408, True, "sparse")
    x, w_in, w_down = made[:3]
    wanted = decode.decode_mlp(x, w_in, w_down)
    compiled = torch.compile(decode.decode_mlp, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x, w_in, w_down), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compiled(x, w_in, w_down)
    for seed in (1, 2):  # other data, other patterns
        other = make_case(tokens, 512, 1408, True, "random", seed=seed).to(torch.bfloat16, "cuda")
        x.copy_(other.x)
        w_in.copy_(other.w_in)
        graph.replay()
        assert torch.equal(found, decode.decode_mlp(x, w_in, w_down))


def test_routes_follow_the_statistics() -> None:
    sparse = Route.of(l0=25, union_fraction=0.073, width=2048, hidden=5632)
    busy = Route.of(l0=321, union_fraction=0.664, width=2048, hidden=5632)
    full = Route.of(l0=5632, union_fraction=1.0, width=2048, hidden=5632)
    assert sparse.decode_upto == 64
    assert 0 < busy.decode_upto < 64
    assert 256 <= sparse.sparse_from < busy.sparse_from < NEVER
    assert full == Route(0, NEVER)


def test_small_layers_need_more_tokens_to_pay() -> None:
    small, large = (Route.of(10, 0.1, width, 4 * width) for width in (512, 8192))
    assert small.sparse_from > large.sparse_from
