"""Where the kernels do not apply, the dense path runs and says why, once."""

import logging

import pytest
import torch

from megasparse.mlp import device_reason, sparse_mlp, unsupported_reason
from megasparse.mlp.cuda import note_dense
from tests.mlp.patterns import make_case

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("dtype", "width", "hidden", "reason"),
    [
        (torch.float32, 64, 64, "the kernels compute in bf16, not torch.float32"),
        (torch.bfloat16, 60, 64, "the kernels need a hidden size that is a multiple of 8, not 60"),
        (torch.bfloat16, 64, 70000, "the kernels take 1 to 65536 neurons a rank, not 70000"),
    ],
)
def test_reasons_are_known_without_a_gpu(dtype: torch.dtype, width: int, hidden: int, reason: str) -> None:
    assert device_reason(CUDA, dtype, width, hidden) == reason


def test_the_cpu_has_no_kernels_but_runs_the_reference() -> None:
    x, w_in, w_down, _ = make_case(4, 8, 16, True, "random")
    assert unsupported_reason(x, w_in, w_down) is None
    assert device_reason(torch.device("cpu"), torch.bfloat16, 64, 64) == "there are no kernels for cpu devices"


def test_other_devices_run_dense_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    note_dense.cache_clear()
    caplog.set_level(logging.WARNING, logger="megasparse.mlp")
    x, w_in, w_down, _ = (tensor.to("meta") for tensor in make_case(4, 8, 16, True, "random"))
    for _ in range(3):
        assert sparse_mlp(x, w_in, w_down, path="sparse").y.shape == (4, 8)
    assert [record.getMessage() for record in caplog.records] == [
        "The sparse MLP runs its dense path: there are no kernels for meta devices."
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_unsupported_layers_on_a_gpu_equal_the_dense_path() -> None:
    case = make_case(40, 60, 16, True, "random").to(torch.bfloat16, "cuda")  # D is no multiple of 8
    assert torch.equal(sparse_mlp(*case[:3], path="sparse").y, sparse_mlp(*case[:3]).y)
