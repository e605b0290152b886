"""What only a GPU can show: its energy counter, its allocator's peaks, its name among the known peaks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megasparse.monitoring.energy import EnergyMeter
from megasparse.monitoring.memory import LayerMemoryProbe, PeakMemory
from megasparse.monitoring.throughput import peak_bf16_flops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a CUDA GPU of compute capability 9.0",
    ),
]

TOKENS, WIDTH, HIDDEN = 4096, 1024, 4096
MEBI = 2**20


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False, dtype=torch.bfloat16, device="cuda")
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False, dtype=torch.bfloat16, device="cuda")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def test_energy_counter_moves_with_work() -> None:
    meter = EnergyMeter()
    assert meter.available, "this GPU keeps an energy counter"
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    meter.read()
    for _ in range(300):
        a @ a
    torch.cuda.synchronize()
    joules = meter.read()
    # 300 products of 1.1 TFLOP take about 0.4 s of a GPU that draws between 100 and 700 W.
    assert 10 < joules < 2000


def test_layer_memory_by_hand() -> None:
    mlp, peak = Mlp(), PeakMemory()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    for _ in range(2):  # cuBLAS allocates its workspace in the first call
        (mlp(x * 1).sum()).backward()
        mlp.zero_grad()
    peak.read()
    probe = LayerMemoryProbe([mlp], peak)
    probe.arm()
    mlp(x * 1).sum().backward()
    layers = probe.collect()
    assert layers is not None
    tokens_by_width, tokens_by_hidden = 2 * TOKENS * WIDTH, 2 * TOKENS * HIDDEN
    assert layers[0].saved_bytes == tokens_by_width + tokens_by_hidden
    # Forward: both sides of the ReLU at once. Backward: the gradients of both sides of the ReLU, beside a new weight
    # gradient; less than all of it at once.
    weights = 2 * 2 * WIDTH * HIDDEN
    assert 2 * tokens_by_hidden <= layers[0].peak_bytes <= 2 * tokens_by_hidden + tokens_by_width + weights + 4 * MEBI


def test_peak_memory_survives_the_layer_probe() -> None:
    peak = PeakMemory()
    peak.read()
    level = torch.cuda.memory_allocated()
    block = torch.empty(256 * MEBI, dtype=torch.uint8, device="cuda")
    del block
    mlp = Mlp()
    probe = LayerMemoryProbe([mlp], peak)
    probe.arm()
    mlp(torch.randn(8, WIDTH, dtype=torch.bfloat16, device="cuda")).sum().backward()
    probe.collect()
    allocated, reserved = peak.read()
    assert allocated >= level + 256 * MEBI
    assert reserved >= allocated
    assert peak.read()[0] < allocated  # a new window


def test_the_device_has_a_known_peak() -> None:
    assert peak_bf16_flops(torch.cuda.get_device_name()) is not None
