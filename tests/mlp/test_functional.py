"""The public function as a torch operator: registration, compilation, recomputation, refusals."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from megasparse.mlp import MainGrads, sparse_mlp
from tests.mlp.patterns import make_case


def leaves(gated: bool = True, dtype: torch.dtype = torch.float32, tokens: int = 150) -> list[torch.Tensor]:
    return [tensor.requires_grad_() for tensor in make_case(tokens, 24, 70, gated, "sparse").to(dtype)[:3]]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_operators_pass_opcheck(gated: bool, masked: bool) -> None:
    sequences = 2 if masked else 1
    x, w_in, w_down = leaves(gated, tokens=256 if masked else 150)
    mask = torch.arange(256) % 3 > 0 if masked else None
    opcheck(torch.ops.megasparse.mlp_dense_forward.default, (x, w_in, w_down, mask, sequences, True, None, None))
    order = torch.arange(70, dtype=torch.int32).flip(0) if masked else None
    opcheck(
        torch.ops.megasparse.mlp_sparse_forward.default,
        (x, w_in, w_down, mask, order, sequences, True, 900, None, None),
    )


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_backward_operators_pass_opcheck(path: str, gated: bool, accumulate: bool) -> None:
    x, w_in, w_down = (tensor.detach() for tensor in leaves(gated, tokens=256))
    main = (torch.zeros_like(w_in), torch.zeros_like(w_down)) if accumulate else (None, None)
    dy, dl1 = torch.randn_like(x), torch.tensor(0.5)
    ops = torch.ops.megasparse
    if path == "dense":
        saved = ops.mlp_dense_forward(x, w_in, w_down, None, 2, True, None, None)[-1]
        arguments = (dy, dl1, w_in, w_down, None, saved)
        opcheck(ops.mlp_dense_input_gradient.default, arguments)
        _, h, da = ops.mlp_dense_input_gradient(*arguments)
        opcheck(ops.mlp_dense_weight_gradients.default, (dy, x, h, da, *main))
    else:
        saved = ops.mlp_sparse_forward(x, w_in, w_down, None, None, 2, True, 9, None, None)[5:]
        arguments = (dy, dl1, x, w_in, w_down, None, None, 2, saved)
        opcheck(ops.mlp_sparse_input_gradient.default, arguments)
        dx, h, du, *dg = ops.mlp_sparse_input_gradient(*arguments)
        again = (*arguments, dx, h, du, dg[0] if gated else None)
        opcheck(ops.mlp_sparse_input_gradient_again.default, again)
        opcheck(ops.mlp_sparse_weight_gradients.default, (dy, x, w_in, w_down, None, 2, saved[:3], [h, du, *dg], *main))


def gradients(function, inputs: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    out = function(*inputs, **options)
    return [out.y.detach(), *torch.autograd.grad(out.y.square().sum() + 0.1 * out.l1, inputs)]


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_compiles_without_graph_break(path: str) -> None:
    # The graph cache does not know the operators' shapes, which may change between versions under development.
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(sparse_mlp, fullgraph=True)
        for expected, value in zip(
            gradients(sparse_mlp, leaves(), path=path), gradients(compiled, leaves(), path=path), strict=True
        ):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(path: str, reentrant: bool) -> None:
    def recomputed(x: torch.Tensor, w_in: torch.Tensor, w_down: torch.Tensor):
        return checkpoint(lambda *inputs: sparse_mlp(*inputs, path=path)[:2], x, w_in, w_down, use_reentrant=reentrant)

    inputs = leaves()
    y, l1 = recomputed(*inputs)
    (y.square().sum() + 0.1 * l1).backward()
    for expected, tensor in zip(gradients(sparse_mlp, leaves(), path=path)[1:], inputs, strict=True):
        assert torch.equal(tensor.grad, expected)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_repeats_bitwise_and_takes_any_leading_shape(path: str) -> None:
    x, w_in, w_down = leaves(dtype=torch.bfloat16)
    flat = sparse_mlp(x, w_in, w_down, path=path)
    shaped = sparse_mlp(x.view(3, 50, 24).transpose(0, 1).contiguous().transpose(0, 1), w_in, w_down, path=path)
    assert shaped.y.shape == (3, 50, 24)
    assert torch.equal(shaped.y.reshape(150, 24), flat.y)
    assert torch.equal(shaped.l1, flat.l1)


def saved_bytes(path: str, capacity: int | None = None) -> int:
    case = make_case(512, 32, 640, True, "sparse").to(torch.bfloat16)
    x, w_in, w_down = (tensor.requires_grad_() for tensor in case[:3])
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in (x.data_ptr(), w_in.data_ptr(), w_down.data_ptr()):
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sparse_mlp(x, w_in, w_down, path=path, capacity=capacity)
    return sum(sizes.values())


def test_saves_in_proportion_to_the_non_zeros() -> None:
    assert saved_bytes("dense") == 2 * 512 * 640 * 2
    few, more = saved_bytes("sparse", 1000), saved_bytes("sparse", 3000)
    assert more - few == 2 * 2000 * 2  # bf16 g and u for each non-zero
    assert few < 0.12 * 3 * 512 * 640 * 2


def test_nothing_is_saved_without_grad() -> None:
    x, w_in, w_down = leaves()
    with torch.no_grad():
        out = torch.ops.megasparse.mlp_sparse_forward(x, w_in, w_down, None, None, 1, False, 0, None, None)
        assert len(out) == 5
        assert not sparse_mlp(x, w_in, w_down).y.requires_grad


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_has_no_second_derivative_and_says_so(path: str) -> None:
    x, w_in, w_down = leaves()
    (dx,) = torch.autograd.grad(sparse_mlp(x, w_in, w_down, path=path).y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 9)}, r"x must be \[\.\.\., 8\]"),
        ({"w_in": torch.zeros(15, 8)}, r"w_in \[20, 8\] \(gated\) or \[10, 8\]"),
        ({"w_in": torch.zeros(20)}, "two-dimensional"),
        ({"w_down": torch.zeros(10, 8, dtype=torch.bfloat16)}, "w_down is torch.bfloat16"),
        ({"token_mask": torch.ones(4)}, r"token_mask must be bool \(4,\)"),
        ({"token_mask": torch.ones(4, dtype=torch.bool, device="meta")}, "x is on cpu but token_mask is on meta"),
        ({"order": torch.zeros(3, dtype=torch.int32, device="meta")}, "x is on cpu but order is on meta"),
        ({"token_mask": torch.ones(5, dtype=torch.bool)}, r"token_mask must be bool \(4,\); got torch.bool \(5,\)"),
        ({"order": torch.arange(10)}, "int32 permutation of 10 neurons; got torch.int64"),
        ({"path": "fast"}, "path is 'fast'"),
        ({"capacity": -1}, "capacity is -1"),
        ({"sequences": 3}, "sequences is 3; it must divide the number of tokens, 4"),
        ({"sequences": 0}, "sequences is 0"),
        ({"main_grads": MainGrads(torch.zeros(20, 8, dtype=torch.bfloat16), torch.zeros(10, 8))}, "main_grads.w_in"),
        (
            {"main_grads": MainGrads(torch.zeros(20, 8), torch.zeros(10, 8, device="meta"))},
            "main_grads.w_down .* on meta",
        ),
    ],
)
def test_refuses_what_does_not_fit(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(4, 8), "w_in": torch.zeros(20, 8), "w_down": torch.zeros(10, 8)} | change
    with pytest.raises(ValueError, match=message):
        sparse_mlp(**arguments)
