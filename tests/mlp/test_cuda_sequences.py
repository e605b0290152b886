"""The CUDA kernels on rows [s, b, D]: every bit as on the same tokens sequence after sequence."""

from typing import Any

import pytest
import torch

from megasparse.mlp import MainGrads, MLPStats, sparse_mlp
from tests.gpu import NEEDS_HOPPER
from tests.mlp.patterns import Case, interleaved, rows_of_tokens
from tests.mlp.test_cuda import L1_WEIGHT, NAMES, check, check_replays, cuda_case, run

pytestmark = NEEDS_HOPPER

SHAPES = [
    (128, 64, 130),  # length, D, H
    (384, 72, 704),
    (256, 520, 1408),
    (1024, 2048, 5640),
]


def check_bitwise(case: Case, sequences: int, **options: Any) -> None:
    """`case` and a token mask in `options` are in the order of tokens."""
    rows = rows_of_tokens(case.x.shape[0], sequences).cuda()
    of_rows = dict(options)
    if (mask := options.get("token_mask")) is not None:
        of_rows["token_mask"] = torch.empty_like(mask)
        of_rows["token_mask"][rows] = mask
    expected = run(case, "sparse", **options)
    found = run(interleaved(case, sequences), "sparse", sequences=sequences, **of_rows)
    for name, a, b in zip((*NAMES, *MLPStats._fields), found, expected, strict=True):
        assert torch.equal(a[rows] if name in ("y", "dx") else a, b), name


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("sequences", [2, 8])
@pytest.mark.parametrize(("length", "width", "hidden"), SHAPES)
def test_bitwise_as_by_sequence(length: int, width: int, hidden: int, sequences: int, gated: bool) -> None:
    check_bitwise(cuda_case(length * sequences, width, hidden, gated, "sparse"), sequences)


@pytest.mark.parametrize("pattern", ["random", "alternating_tiles", "one_row", "one_column", "all_off"])
@pytest.mark.parametrize("sequences", [2, 3, 8])
def test_patterns(pattern: str, sequences: int) -> None:
    check_bitwise(cuda_case(256 * sequences, 264, 712, True, pattern), sequences)


@pytest.mark.parametrize("capacity", [None, 0, 1000])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("sequences", [2, 8])
def test_masked_ordered_and_overflowing(sequences: int, gated: bool, capacity: int | None) -> None:
    tokens = 256 * sequences
    generator = torch.Generator().manual_seed(0)
    options = {
        "token_mask": (torch.rand(tokens, generator=generator) > 0.3).cuda(),
        "order": torch.randperm(1410, generator=generator).int().cuda(),
        "capacity": capacity,
    }
    check_bitwise(cuda_case(tokens, 136, 1410, gated, "sparse"), sequences, **options)


@pytest.mark.parametrize("sequences", [2, 8])
@pytest.mark.parametrize("masked", [True, False])
def test_exact_and_the_dense_path_counts_over_the_same_tiles(sequences: int, masked: bool) -> None:
    tokens = 384 * sequences
    mask = torch.arange(tokens, device="cuda") % 3 > 0 if masked else None
    case = cuda_case(tokens, 256, 1408, True, "alternating_tiles")
    check(interleaved(case, sequences), sequences=sequences, token_mask=mask)
    along_rows = run(interleaved(case, sequences), "dense")
    by_sequence, expected = run(interleaved(case, sequences), "dense", sequences=sequences), run(case, "dense")
    assert MLPStats(*by_sequence[5:]).union < MLPStats(*along_rows[5:]).union
    assert MLPStats(*by_sequence[5:]).union == MLPStats(*expected[5:]).union
    assert torch.equal(MLPStats(*by_sequence[5:]).tile_counts, MLPStats(*expected[5:]).tile_counts)


def test_main_gradients_bitwise() -> None:
    case, mains = cuda_case(1024, 256, 1408, True, "sparse"), []
    for one, sequences in ((case, 1), (interleaved(case, 8), 8)):
        x, w_in, w_down = (tensor.clone().requires_grad_() for tensor in one[:3])
        main = MainGrads(torch.ones_like(w_in, dtype=torch.float32), torch.ones_like(w_down, dtype=torch.float32))
        out = sparse_mlp(x, w_in, w_down, path="sparse", sequences=sequences, main_grads=main)
        torch.autograd.backward([out.y, out.l1], [one.dy, torch.tensor(L1_WEIGHT, device="cuda")])
        mains.append(main)
    assert torch.equal(mains[0].w_in, mains[1].w_in)
    assert torch.equal(mains[0].w_down, mains[1].w_down)


@pytest.mark.parametrize("length", [100, 320])
def test_tiles_follow_the_rows_where_one_would_span_two_sequences(length: int) -> None:
    case = cuda_case(length * 8, 128, 704, True, "sparse")
    for a, b in zip(run(case, "sparse", sequences=8), run(case, "sparse"), strict=True):
        assert torch.equal(a, b)


def test_graph_of_forward_and_backward_replays() -> None:
    case = interleaved(cuda_case(1024, 256, 1408, True, "sparse"), 8)
    leaves = [tensor.clone().requires_grad_() for tensor in case[:3]]
    upstream = torch.tensor(L1_WEIGHT, device="cuda")
    mask = torch.arange(1024, device="cuda") % 3 > 0

    def step() -> list[torch.Tensor]:
        out = sparse_mlp(*leaves, path="sparse", sequences=8, token_mask=mask, capacity=1024 * 200)
        return [out.y, out.l1, *torch.autograd.grad([out.y, out.l1], leaves, [case.dy, upstream]), *out.stats]

    check_replays(step, leaves, [interleaved(cuda_case(1024, 256, 1408, True, "random", seed=1), 8)])
