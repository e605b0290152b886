"""Which Adam a run takes, and its state in a checkpoint."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

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


def spoil_after_save(sections: dict[str, Any]) -> list[str]:
    """Saves in the background after one step, spoils everything at once, loads. Returns what is not as it was."""
    from megasparse.config import parse_config
    from megasparse.megatron.optimizer_shards import OwnShards
    from megasparse.training import loop
    from megasparse.training.distributed import initialize, shut_down
    from megasparse.training.launch_environment import read_environment
    from megasparse.training.signals import StopWatcher

    cfg, launch = parse_config(sections), read_environment()
    run = loop.start(cfg, launch, initialize(cfg, launch), StopWatcher(None, None), [])
    loop.run_step(run)
    [optimizer] = run.state.optimizer.chained_optimizers
    tensors = {f"weight {index}": weight.detach() for index, weight in enumerate(run.state.model[0].parameters())}
    for index, state in enumerate(OwnShards(optimizer).states()):
        tensors |= {f"{name} of share {index}": tensor for name, tensor in state.items()}
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    loop.save(run)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    run.checkpointer.finish()
    run.checkpointer.load(run.checkpointer.locate(cfg.run_directory), run.state)
    run.checkpointer.close()
    run.loader.close()
    shut_down()
    return [name for name, tensor in tensors.items() if not torch.equal(tensor, wanted[name])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_background_save_is_of_the_moment_when_it_began(tmp_path: Path, data_folder: Path, precision: str) -> None:
    """What is saved are views of the optimizer's own tensors, which the next step changes."""
    sections = configuration(
        tmp_path / "run",
        str(data_folder / "a"),
        training={"precision": precision},
        parallel={"distributed_optimizer": True},
        checkpoint={"async_save": True},
    )
    for changed in run_distributed(2, "tests.training.test_optimizer:spoil_after_save", sections):
        assert not changed


def train_then_resume(whole: dict[str, Any], resumed: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of a run, and of one that begins with the checkpoint of its second step. There are several buckets, as in
    large models."""
    from megasparse.training import optimizer

    config = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = partial(config, bucket_size=600)  # type: ignore[assignment, misc]
    try:
        [first] = train_all([whole])
        if dist.get_rank() == 0:
            name = "checkpoints/step_00000002"
            shutil.copytree(Path(whole["run"]["directory"]) / name, Path(resumed["run"]["directory"]) / name)
        dist.barrier()
        return [first, *train_all([resumed])]
    finally:
        optimizer.DistributedDataParallelConfig = config  # type: ignore[misc]


@pytest.mark.parametrize("world", [2, 3])
def test_state_of_buckets_that_end_in_padding_is_saved_as_it_is(tmp_path: Path, data_folder: Path, world: int) -> None:
    """Each is padded to a multiple of 128 and of the data-parallel size: where that is 3, nearly all of them."""
    whole, resumed, alone = (
        configuration(
            tmp_path / name,
            str(data_folder / "a"),
            training={"steps": 6, "global_batch_size": 6},
            parallel={"distributed_optimizer": True, "overlap_grad_reduce": name != "alone"},
            checkpoint={"interval": 2, "keep_last": 3},
        )
        for name in ("whole", "resumed", "alone")
    )
    name = "checkpoints/step_00000002"
    records = run_distributed(world, "tests.training.test_optimizer:train_then_resume", whole, resumed)
    for first, second in records:
        assert sorted(second["steps"]) == [3, 4, 5, 6]
        for step in second["steps"]:
            assert second["steps"][step]["loss/lm"] == first["steps"][step]["loss/lm"]
        assert second["digest"] == first["digest"]
    # One rank, whose buckets are others, finds it too.
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "alone" / name)
    [[record]] = run_distributed(1, "tests.training.cases:train_all", [alone])
    assert sorted(record["steps"]) == [3, 4, 5, 6]
    for step, metrics in record["steps"].items():
        for metric in ("loss/lm", "grad_norm"):
            assert metrics[metric] == pytest.approx(first["steps"][step][metric], rel=1e-5)
