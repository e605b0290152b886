"""The CUDA kernels on a GPU of compute capability 9.0: exact for every pattern, repeatable, capturable."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasparse.mlp import MainGrads, MLPStats, sparse_mlp
from megasparse.mlp.synthetic import fit
from tests.gpu import NEEDS_HOPPER
from tests.mlp.patterns import PATTERNS, Case, make_case, reference, relative_error

DATA = Path(__file__).parent / "data" / "recorded.npz"
L1_WEIGHT = 0.01
NAMES = ("y", "l1", "dx", "dw_in", "dw_down")

pytestmark = NEEDS_HOPPER


def poison() -> None:
    """Fill the memory that the next call will be given with NaN (bf16, fp32) or huge integers."""
    held = [torch.full((1 << 26,), float("nan"), device="cuda") for _ in range(6)]
    small = [torch.full((size,), float("nan"), device="cuda") for size in (1, 128, 4096, 1 << 16, 1 << 20) * 8]
    del held, small


def run(case: Case, path: str, **options: object) -> tuple[torch.Tensor, ...]:
    """y, l1, dx, dw_in, dw_down and the statistics."""
    x, w_in, w_down = (tensor.detach().clone().requires_grad_() for tensor in case[:3])
    poison()
    out = sparse_mlp(x, w_in, w_down, path=path, **options)
    poison()
    torch.autograd.backward([out.y, out.l1], [case.dy, torch.tensor(L1_WEIGHT, device="cuda")])
    return (out.y.detach(), out.l1.detach(), x.grad, w_in.grad, w_down.grad, *out.stats)


def check(case: Case, **options: object) -> None:
    """All five outputs no further from fp64 than the dense bf16 path's, and the same statistics."""
    wanted = reference(case, L1_WEIGHT, options.get("token_mask"))
    shared = {name: value for name, value in options.items() if name in ("token_mask", "sequences")}
    dense, sparse = run(case, "dense", **shared), run(case, "sparse", **options)
    for name, a, b, expected, magnitude in zip(
        NAMES, dense[:5], sparse[:5], wanted[:5], wanted.magnitudes, strict=True
    ):
        dense_error, sparse_error = (value.double() - expected for value in (a, b))
        scale = float(magnitude.norm())
        assert float(dense_error.norm()) <= 0.01 * scale, f"{name}: dense path {float(dense_error.norm())}"
        assert float(sparse_error.norm()) <= 1.05 * float(dense_error.norm()) + 2e-4 * scale, (
            f"{name}: sparse {float(sparse_error.norm())}, dense {float(dense_error.norm())}, scale {scale}"
        )
        if b.numel():  # no element far off, which a norm could hide
            worst, allowed = float(sparse_error.abs().max()), float(dense_error.abs().max())
            assert worst <= 1.5 * allowed + 1e-3 * float(magnitude.max()), f"{name}: element {worst}, dense {allowed}"
    # The two gate products may round differently at zero: a few neurons in a million may differ.
    found, of_dense = MLPStats(*sparse[5:]), MLPStats(*dense[5:])
    assert found.tokens == of_dense.tokens
    assert abs(int(found.active) - int(of_dense.active)) <= 1e-4 * int(of_dense.active) + 4
    assert (found.fired != of_dense.fired).sum() <= 1e-3 * found.fired.numel() + 2
    assert abs(int(found.union) - int(of_dense.union)) <= 1e-3 * int(of_dense.union) + 4
    assert found.tiles == of_dense.tiles
    assert found.tile_counts.sum() == found.union


def cuda_case(*arguments: object, **keywords: object) -> Case:
    return make_case(*arguments, **keywords).to(torch.bfloat16, "cuda")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_adversarial_patterns(pattern: str, gated: bool) -> None:
    check(cuda_case(700, 256, 1408, gated, pattern))


@pytest.mark.parametrize("width", [64, 72, 512, 2048, 8192])
def test_widths(width: int) -> None:
    check(cuda_case(260, width, 704, True, "sparse"))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_shapes(data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from([0, 1, 7, 128, 129, 4095]) | st.integers(1, 1500), "tokens")
    hidden = data.draw(st.sampled_from([1, 64, 704, 1408, 5632, 5640]) | st.integers(1, 3000), "hidden")
    width = 8 * data.draw(st.integers(1, 96), "width / 8")
    gated = data.draw(st.booleans(), "gated")
    case = cuda_case(tokens, width, hidden, gated, data.draw(st.sampled_from(PATTERNS), "pattern"))
    options: dict[str, object] = {"capacity": data.draw(st.sampled_from([None, 0, tokens * hidden]), "capacity")}
    generator = torch.Generator().manual_seed(tokens)
    if data.draw(st.booleans(), "ordered"):
        options["order"] = torch.randperm(hidden, generator=generator).int().cuda()
    if data.draw(st.booleans(), "masked"):
        options["token_mask"] = (torch.rand(tokens, generator=generator) > 0.3).cuda()
    check(case, **options)


def recorded(layer: str, width: int = 512, hidden: int = 5632) -> Case:
    with np.load(DATA) as archive:
        pattern = torch.from_numpy(np.unpackbits(archive[layer], axis=1)[:, :hidden].astype(bool))
    generator = torch.Generator("cuda").manual_seed(0)
    x, w_gate = fit(pattern, width, generator)
    tokens = x.shape[0]
    w_up = torch.randn(hidden, width, device="cuda", generator=generator) / width**0.5
    w_down = torch.randn(hidden, width, device="cuda", generator=generator) / hidden**0.5
    dy = torch.randn(tokens, width, device="cuda", generator=generator)
    case = Case(x, torch.cat([w_gate, w_up]), w_down, dy).to(torch.bfloat16, "cuda")
    active = case.x @ case.w_in[:hidden].t() > 0
    assert (active != pattern.cuda()).sum() < 0.02 * pattern.sum()
    return case


@pytest.mark.parametrize("layer", ["layer0", "layer2", "layer5", "layer7"])
def test_recorded_patterns(layer: str) -> None:
    case = recorded(layer)
    frequency = (case.x @ case.w_in[: case.hidden].t() > 0).sum(0)
    check(case, order=frequency.argsort(descending=True).int())
    check(case, capacity=100)  # saved buffers far too small: computed again in the backward


def test_a_full_tile_of_256_neurons() -> None:
    case = make_case(300, 128, 1408, True, "all_off")
    case.w_in[256:512, 0] = 8.0
    check(case.to(torch.bfloat16, "cuda"))


def test_more_entries_than_31_bits_count() -> None:
    """The last tiles of M x H > 2^31 (and of offsets over 2^15) come out as they do alone. Needs 60 GB."""
    tokens, alone, hidden = 65536, 256, 32896
    case = cuda_case(tokens, 64, hidden, True, "sparse")
    case.dy[:-alone] = 0
    last = torch.arange(tokens, device="cuda") >= tokens - alone
    end = Case(case.x[-alone:], case.w_in, case.w_down, case.dy[-alone:])
    found = run(case, "sparse", token_mask=last, capacity=tokens * hidden // 8)
    wanted = run(end, "sparse", capacity=alone * hidden // 8)
    assert torch.equal(found[0][-alone:], wanted[0])
    assert torch.equal(found[2][-alone:], wanted[2])
    assert not found[2][:-alone].any()
    for name, a, b in zip(NAMES[1::2] + NAMES[4:], found[1:5:2] + found[4:5], wanted[1:5:2] + wanted[4:5], strict=True):
        assert relative_error(a, b) < 1e-2, name
    assert torch.equal(MLPStats(*found[5:]).fired, MLPStats(*wanted[5:]).fired)


@pytest.mark.parametrize("capacity", [None, 0])
def test_repeats_bitwise(capacity: int | None) -> None:
    case = cuda_case(1000, 512, 2816, True, "sparse")
    first = run(case, "sparse", capacity=capacity)
    for _ in range(5):
        for a, b in zip(first, run(case, "sparse", capacity=capacity), strict=True):
            assert torch.equal(a, b)


def test_capacity_changes_no_bit() -> None:
    case = cuda_case(1000, 512, 2816, True, "sparse")
    for a, b in zip(run(case, "sparse", capacity=1000 * 2816), run(case, "sparse", capacity=5), strict=True):
        assert torch.equal(a, b)


def test_nan_and_infinity_propagate_as_in_dense() -> None:
    case = cuda_case(300, 128, 704, True, "sparse")
    case.x[3, 5] = torch.nan
    case.x[140, 7] = torch.inf
    dense, sparse = run(case, "dense"), run(case, "sparse")
    for name, a, b in zip(NAMES, dense[:5], sparse[:5], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name


def test_no_tokens() -> None:
    case = cuda_case(0, 64, 128, True, "random")
    y, l1, dx, dw_in, dw_down, *_ = run(case, "sparse")
    assert y.shape == dx.shape == (0, 64)
    assert l1 == 0
    assert not dw_in.any()
    assert not dw_down.any()


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_main_gradients_accumulate(path: str) -> None:
    case = cuda_case(700, 256, 1408, True, "sparse")
    wanted = reference(case, L1_WEIGHT)
    x, w_in, w_down = (tensor.clone().requires_grad_() for tensor in case[:3])
    start = [
        torch.randn_like(w_in.detach(), dtype=torch.float32),
        torch.randn_like(w_down.detach(), dtype=torch.float32),
    ]
    main = MainGrads(*(tensor.clone() for tensor in start))
    outs = [sparse_mlp(x, w_in, w_down, path=path, main_grads=main) for _ in range(3)]
    for out in outs:
        torch.autograd.backward([out.y, out.l1], [case.dy, torch.tensor(L1_WEIGHT, device="cuda")])
    assert w_in.grad is None
    for name in ("w_in", "w_down"):
        added = (getattr(main, name) - start[name == "w_down"]).double()
        assert relative_error(added / 3, getattr(wanted, f"d{name}")) < 0.01, name


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element into its memory."""
    held = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return held[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("capacity", [None, 0])
def test_views_of_any_alignment_and_stride(capacity: int | None) -> None:
    case = cuda_case(300, 128, 704, True, "sparse")
    mask = torch.arange(600, device="cuda")[::2] % 3 > 0
    order = torch.stack([torch.randperm(704, device="cuda").int()] * 2, 1)[:, 0]
    wanted = run(case, "sparse", token_mask=mask.clone(), order=order.contiguous(), capacity=capacity)
    strided = torch.stack([mask, mask], 1)[:, 0]
    x, w_in, w_down = (shifted(tensor).requires_grad_() for tensor in case[:3])
    out = sparse_mlp(x, w_in, w_down, path="sparse", token_mask=strided, order=order, capacity=capacity)
    torch.autograd.backward([out.y, out.l1], [shifted(case.dy), torch.tensor(L1_WEIGHT, device="cuda")])
    found = (out.y.detach(), out.l1.detach(), x.grad, w_in.grad, w_down.grad, *out.stats)
    for name, a, b in zip((*NAMES, *MLPStats._fields), found, wanted, strict=True):
        assert torch.equal(a, b), name


def test_main_gradients_that_the_kernels_cannot_write_are_refused() -> None:
    case = cuda_case(300, 128, 704, True, "sparse")
    x, w_in, w_down = (tensor.clone().requires_grad_() for tensor in case[:3])
    main = MainGrads(*(shifted(torch.zeros_like(weight, dtype=torch.float32)) for weight in (w_in, w_down)))
    with pytest.raises(RuntimeError, match="multiple of 8 bytes"):
        sparse_mlp(x, w_in, w_down, path="sparse", main_grads=main).y.backward(case.dy)


def check_replays(step: Callable[[], list[torch.Tensor]], leaves: list[torch.Tensor], others: list[Case]) -> None:
    """One graph of `step` computes on other data, of other patterns, what a call computes, bit by bit."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in others:
        with torch.no_grad():
            for leaf, value in zip(leaves, other[:3], strict=True):
                leaf.copy_(value)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for a, b in zip(replayed, step(), strict=True):
            assert torch.equal(a, b)


def test_graph_of_forward_and_backward_replays() -> None:
    case = cuda_case(700, 256, 1408, True, "sparse")
    leaves = [tensor.clone().requires_grad_() for tensor in case[:3]]
    upstream = torch.tensor(L1_WEIGHT, device="cuda")

    def step() -> list[torch.Tensor]:
        out = sparse_mlp(*leaves, path="sparse", capacity=700 * 200)
        return [out.y, out.l1, *torch.autograd.grad([out.y, out.l1], leaves, [case.dy, upstream]), *out.stats]

    others = [cuda_case(700, 256, 1408, True, pattern, seed=seed) for seed, pattern in ((1, "sparse"), (2, "random"))]
    check_replays(step, leaves, others)


def test_runs_on_a_side_stream_without_synchronising() -> None:
    case = cuda_case(700, 256, 1408, True, "sparse")
    wanted = run(case, "sparse")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            leaves = [tensor.detach().clone().requires_grad_() for tensor in case[:3]]
            upstream = torch.full((), L1_WEIGHT, device="cuda")
            out = sparse_mlp(*leaves, path="sparse")
            gradients = torch.autograd.grad([out.y, out.l1], leaves, [case.dy, upstream])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for a, b in zip(gradients, wanted[2:5], strict=True):
        assert torch.equal(a, b)


def test_compiles_and_recomputes() -> None:
    case = cuda_case(300, 128, 704, True, "sparse")
    wanted = run(case, "sparse")
    leaves = [tensor.clone().requires_grad_() for tensor in case[:3]]
    compiled = torch.compile(lambda *inputs: sparse_mlp(*inputs, path="sparse")[:2], fullgraph=True)
    for function in (
        compiled,
        lambda *inputs: torch.utils.checkpoint.checkpoint(compiled, *inputs, use_reentrant=False),
    ):
        y, l1 = function(*leaves)
        gradients = torch.autograd.grad([y, l1], leaves, [case.dy, torch.tensor(L1_WEIGHT, device="cuda")])
        for a, b in zip([y, l1, *gradients], wanted[:5], strict=True):
            assert torch.equal(a.detach(), b)


def test_dense_path_counts_as_the_pytorch_one() -> None:
    case = cuda_case(300, 128, 704, True, "sparse")
    mask = torch.arange(300, device="cuda") % 3 > 0
    on_gpu = run(case, "dense", token_mask=mask)
    with torch.no_grad():
        on_cpu = sparse_mlp(*(tensor.cpu() for tensor in case[:3]), token_mask=mask.cpu())
    assert relative_error(on_gpu[0].cpu(), on_cpu.y) < 1e-2
    assert relative_error(on_gpu[1].cpu(), on_cpu.l1) < 1e-3
    stats = MLPStats(*on_gpu[5:])
    assert stats.tokens == on_cpu.stats.tokens == mask.sum()
    assert abs(int(stats.active) - int(on_cpu.stats.active)) <= 3


SANITIZED = """
import torch
from megasparse.mlp import sparse_mlp
from tests.mlp.patterns import make_case
for gated, tokens, sequences in ((True, 200, 1), (False, 200, 1), (True, 256, 2), (False, 256, 2)):
    case = make_case(tokens, 64, 130, gated, "sparse").to(torch.bfloat16, "cuda")
    leaves = [tensor.requires_grad_() for tensor in case[:3]]
    order = torch.randperm(130).int().cuda()
    for capacity in (None, 3):
        out = sparse_mlp(*leaves, path="sparse", sequences=sequences, order=order, capacity=capacity)
        torch.autograd.grad([out.y, out.l1], leaves, [case.dy, torch.ones((), device="cuda")])
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).is_file():
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", SANITIZED]
    # memcheck objects to the first allocation of expandable segments.
    environment = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment, timeout=280)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "finished" in done.stdout
