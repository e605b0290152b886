"""Operators called directly in eager code, and as PyTorch's wherever it must see them."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megasparse.mlp import sparse_mlp
from megasparse.mlp.operator import operator

seen: list[str] = []


@operator("megasparse_test::double")
def double(x: Tensor, note: str) -> Tensor:
    seen.append(note)
    return 2 * x


@double.custom.register_fake
def _(x: Tensor, note: str) -> Tensor:
    return torch.empty_like(x)


class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that PyTorch's dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_eager_code_runs_the_implementation_itself() -> None:
    with Dispatched() as dispatched:
        y = double(torch.ones(3), "eager")
    assert torch.equal(y, torch.full((3,), 2.0))
    assert seen.pop() == "eager"
    assert not [name for name in dispatched.names if name.startswith("megasparse_test")]


def test_a_kernel_for_the_device_comes_first() -> None:
    @operator("megasparse_test::where")
    def where(x: Tensor) -> Tensor:
        return x + 1

    where.register_kernel("cpu", lambda x: x + 2)
    assert where(torch.zeros(())) == 2
    assert torch.ops.megasparse_test.where(torch.zeros(())) == 2


def test_compiled_code_and_subclasses_have_the_operator() -> None:
    compiled = torch.compile(lambda x: double(x, "compiled") + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    assert seen.pop() == "compiled"
    with FakeTensorMode() as mode:
        fake = double(mode.from_tensor(torch.ones(5)), "fake")
    assert fake.shape == (5,)
    assert not seen


def test_types_hold_under_autocast() -> None:
    x, w_in, w_down = (torch.randn(*shape, requires_grad=True) for shape in ((6, 8), (32, 8), (16, 8)))
    for path in ("dense", "sparse"):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = sparse_mlp(x, w_in, w_down, path=path, capacity=6 * 16)
                results.append([out.y, *torch.autograd.grad(out.y.sum() + out.l1, [x, w_in, w_down])])
        torch.testing.assert_close(*results, rtol=0, atol=0)
