"""Which Adam a run takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import run_distributed
from tests.training.cases import configuration, train_all


class CudaAdam:
    """Stands where Megatron puts an installed Transformer Engine's functions, which fail on the CPU as this does."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA kernels called on the CPU")


def train_with_fused_adam_installed(sections: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam = False, CudaAdam
    distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.Adam = True, CudaAdam
    clip_grads.multi_tensor_applier = clip_grads.l2_norm_impl = CudaAdam
    return train_all([sections])[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the fused Adam is the right one")
def test_without_a_gpu_an_installed_fused_adam_is_not_taken(tmp_path: Path, data_folder: Path) -> None:
    sections = configuration(
        tmp_path / "run", str(data_folder / "a"), training={"steps": 5}, parallel={"distributed_optimizer": True}
    )
    [record] = run_distributed(1, "tests.training.test_optimizer:train_with_fused_adam_installed", sections)
    assert record["steps"][5]["loss/lm"] < record["steps"][1]["loss/lm"]
