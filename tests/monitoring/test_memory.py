import mmap

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megasparse.monitoring.memory import LayerMemoryProbe, PeakMemory, resident_bytes

TOKENS, WIDTH, HIDDEN = 7, 16, 40
KEPT = 4 * TOKENS * (WIDTH + HIDDEN)
"""fp32: the input for the first product, the activation once for both ReLU and the second product; no weights."""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.mlps, self.recompute = nn.ModuleList([Mlp(), Mlp()]), recompute

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + (checkpoint(mlp, x, use_reentrant=True) if self.recompute else mlp(x))
        return x


def run(model: Chain, calls: int = 1) -> LayerMemoryProbe:
    probe = LayerMemoryProbe(list(model.mlps), PeakMemory())
    probe.arm()
    for _ in range(calls):
        model(torch.randn(TOKENS, WIDTH, requires_grad=True)).sum().backward()
    return probe


def test_saved_bytes_by_hand() -> None:
    layers = run(Chain(recompute=False)).collect()
    assert layers is not None
    assert [layer.saved_bytes for layer in layers] == [KEPT, KEPT]
    assert [layer.peak_bytes for layer in layers] == [KEPT + 4 * TOKENS * WIDTH] * 2


def test_recomputation_counts_once() -> None:
    layers = run(Chain(recompute=True)).collect()
    assert layers is not None
    assert [layer.saved_bytes for layer in layers] == [KEPT, KEPT]


def test_several_micro_batches_count_as_one() -> None:
    layers = run(Chain(recompute=False), calls=3).collect()
    assert layers is not None
    assert [layer.saved_bytes for layer in layers] == [KEPT, KEPT]


def test_gradients_are_those_of_an_unwatched_run() -> None:
    gradients = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Chain(recompute=False)
        if watched:
            run(model).collect()
        model.zero_grad()
        torch.manual_seed(1)
        probe = LayerMemoryProbe(list(model.mlps), PeakMemory())
        if watched:
            probe.arm()
        model(torch.randn(TOKENS, WIDTH)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, watched_gradient in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, watched_gradient)


def test_hooks_are_gone_after_collect() -> None:
    model = Chain(recompute=False)
    probe = run(model)
    probe.collect()
    assert all(not mlp._forward_hooks and not mlp._forward_pre_hooks for mlp in model.mlps)
    assert probe.collect() is None


def test_nothing_measured_without_autograd() -> None:
    model = Chain(recompute=False)
    probe = LayerMemoryProbe(list(model.mlps), PeakMemory())
    probe.arm()
    with torch.no_grad():
        model(torch.randn(TOKENS, WIDTH))
    assert probe.collect() is None


def test_an_exception_in_the_layer_leaves_no_hook_behind() -> None:
    model = Chain(recompute=False)
    probe = LayerMemoryProbe(list(model.mlps), PeakMemory())
    probe.arm()
    try:
        model(torch.randn(TOKENS, WIDTH + 1))
    except RuntimeError:
        pass
    else:
        raise AssertionError("a wrong width must fail")
    probe.collect()
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(x.exp().sum(), x)[0], x.exp())


def test_resident_bytes_grow_with_an_allocation() -> None:
    before, _ = resident_bytes()
    with mmap.mmap(-1, 32 * 2**20) as block:  # malloc may give memory that the process has already
        block.write(b"x" * len(block))
        now, peak = resident_bytes()
    assert now - before > 24 * 2**20
    assert peak >= now
