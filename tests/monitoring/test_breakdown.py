"""Attribution of a step's time: a trace made by hand, with GPU kernels, and a real one of a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megasparse.monitoring.breakdown import attribute_time, profile_step

MAIN, BACKWARD, STREAM = 1, 2, 7


def host(category: str, name: str, tid: int, start: float, length: float, **args: Any) -> dict[str, Any]:
    named = {key.replace("_", " "): value for key, value in args.items()}
    return {"ph": "X", "cat": category, "name": name, "tid": tid, "ts": start, "dur": length, "args": named}


def launch(tid: int, at: float, correlation: int) -> dict[str, Any]:
    return host("cuda_runtime", "cudaLaunchKernel", tid, at, 0.5, correlation=correlation)


def kernel(name: str, start: float, length: float, correlation: int) -> dict[str, Any]:
    return host("kernel", name, STREAM, start, length, correlation=correlation)


def test_kernels_belong_to_the_range_of_their_forward() -> None:
    node = "autograd::engine::evaluate_function: "
    events = [
        # Attention in the forward: a view without a node carries the number of the node that comes next.
        host("user_annotation", "part: residual", MAIN, 0, 100),
        host("user_annotation", "part: attention", MAIN, 10, 20),
        host("cpu_op", "aten::mm", MAIN, 11, 5, Sequence_number=4, Fwd_thread_id=0),
        launch(MAIN, 12, 1),
        host("cpu_op", "aten::detach", MAIN, 20, 1, Sequence_number=5, Fwd_thread_id=0),
        host("user_annotation", "part: MLP", MAIN, 40, 20),
        host("cpu_op", "fused", MAIN, 41, 5, Sequence_number=5, Fwd_thread_id=0),
        launch(MAIN, 42, 2),
        host("cpu_op", "aten::add", MAIN, 70, 5, Sequence_number=6, Fwd_thread_id=0),
        launch(MAIN, 71, 3),
        # The backward, on a thread of its own.
        host("cpu_op", node + "AddBackward0", BACKWARD, 200, 5, Sequence_number=6, Fwd_thread_id=1),
        launch(BACKWARD, 201, 4),
        host("cpu_op", node + "FusedBackward", BACKWARD, 210, 5, Sequence_number=5, Fwd_thread_id=1),
        launch(BACKWARD, 211, 5),
        host("cpu_op", node + "MmBackward0", BACKWARD, 220, 5, Sequence_number=4, Fwd_thread_id=1),
        launch(BACKWARD, 221, 6),
        host("cpu_op", node + "torch::autograd::AccumulateGrad", BACKWARD, 230, 5),
        launch(BACKWARD, 231, 7),
        launch(BACKWARD, 240, 8),
        host("user_annotation", "part: optimizer", MAIN, 300, 20),
        launch(MAIN, 301, 9),
        kernel("gemm", 1000, 100, 1),
        kernel("mlp", 1100, 200, 2),
        kernel("add", 1300, 10, 3),
        kernel("add", 1320, 10, 4),  # 10 of idle before it
        kernel("mlp_backward", 1330, 400, 5),
        kernel("gemm", 1730, 150, 6),
        kernel("axpy", 1880, 20, 7),
        kernel("ncclDevKernel_AllReduce", 1850, 100, 8),  # beside the two before it
        kernel("adam", 1950, 50, 9),
    ]
    found = attribute_time(events)
    microseconds = {name: round(value * 1e6, 6) for name, value in found.parts.items() if value}
    assert microseconds == {
        "attention": 250, "MLP": 600, "residual": 20, "gradients": 20, "communication": 100, "optimizer": 50,
    }  # fmt: skip
    assert found.idle == pytest.approx(10e-6)
    assert found.busy == pytest.approx(990e-6)
    assert found.communication == pytest.approx(100e-6)
    assert found.exposed == pytest.approx(50e-6)
    assert list(found.kernels["MLP"]) == ["mlp_backward", "mlp"]


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    events = [
        kernel("gemm", 0, 100, 1),
        kernel("ncclDevKernel_AllGather", 80, 60, 2),  # 20 behind the product, 40 alone
        kernel("ncclDevKernel_SendRecv", 120, 50, 3),  # beside the other for 20; then 30 alone
        kernel("gemm", 170, 100, 4),
        kernel("ncclDevKernel_ReduceScatter", 180, 80, 5),  # hidden
        host("gpu_memcpy", "Memcpy DtoD", STREAM, 300, 10, correlation=6),
        kernel("ncclDevKernel_AllReduce", 305, 25, 7),  # 5 beside the copy, 20 alone
    ]
    found = attribute_time(events)
    assert found.parts["communication"] == pytest.approx((60 + 50 + 80 + 25) * 1e-6)
    assert found.communication == pytest.approx((90 + 80 + 25) * 1e-6)
    assert found.exposed == pytest.approx((40 + 30 + 20) * 1e-6)
    assert found.idle == pytest.approx(30e-6)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention, self.mlp = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.self_attention(x)).sum()  # type: ignore[no-any-return]


def test_a_real_backward_finds_its_modules() -> None:
    layer, x = Layer(), torch.randn(512, 64)
    layer.mlp.weight.requires_grad_(False)
    parts = profile_step([layer], lambda: layer(x).backward()).parts
    # Attention: two products of the forward's size; MLP: two as well (output, gradient of the input).
    assert parts["attention"] > 0.1 * parts["MLP"] > 0
    forward_only = profile_step([layer], lambda: layer(x)).parts
    assert parts["MLP"] > forward_only["MLP"] > 0
