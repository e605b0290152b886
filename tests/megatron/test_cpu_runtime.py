"""The names of CUDA that Megatron-Core uses mean the CPU where there is no CUDA, and nothing else changes."""

import subprocess
import sys

import pytest
import torch

from megasparse.megatron import cpu_runtime_enabled, enable_cpu_runtime

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="acts only without CUDA")


def test_factories_streams_and_events() -> None:
    assert enable_cpu_runtime()
    assert cpu_runtime_enabled()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream())
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.default_stream().wait_stream(torch.cuda.Stream())
    assert event.query()


def test_types_are_changed_for_megatron_alone() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"
    names = {"__name__": "megatron.core.something", "tensor": torch.zeros(1)}
    assert eval("tensor.type()", names) == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_random_states_of_tensor_parallel_ranks() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
    from megatron.core.tensor_parallel.random import checkpoint

    model_parallel_cuda_manual_seed(5, force_reset_rng=True, tp_rank=0, ep_rank=0, etp_rank=0)
    outside = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        second = torch.rand(3)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True, tp_rank=0, ep_rank=0, etp_rank=0)
    assert torch.equal(torch.rand(3), outside)
    with get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(3), first)
    assert not torch.equal(first, second)

    # Recomputation drops the same entries as the first forward did.
    x = torch.ones(64, requires_grad=True)
    y = checkpoint(lambda t: torch.nn.functional.dropout(t, 0.5), False, x)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


def test_everything_is_given_back() -> None:
    code = (
        "import torch; before = (torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream)\n"
        "from megasparse.megatron import disable_cpu_runtime, cpu_runtime_enabled\n"
        "assert cpu_runtime_enabled() and torch.zeros is not before[0]\n"
        "disable_cpu_runtime(); assert not cpu_runtime_enabled()\n"
        "assert before == (torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_default_devices_still_hold() -> None:
    # A fresh process: the list of factories that `torch.device` acts on is made once.
    code = (
        "import torch, megasparse.megatron\n"
        "with torch.device('meta'):\n"
        "    assert torch.arange(4).device.type == 'meta'\n"
        "    assert torch.zeros(4).device.type == 'meta'\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
