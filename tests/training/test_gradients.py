"""Gradients after the backward: Megatron's results without its waits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.launch import run_distributed
from tests.training.cases import configuration, train_all


class Read(Exception):
    """The host looked at a number of the device."""


def compare(sections: dict[str, Any]) -> list[float]:
    """Largest difference of any gradient from what Megatron's own function makes of it, in every step."""
    from megatron.core.distributed import finalize_model_grads

    from megasparse.training import step
    from megasparse.training.gradients import finish_gradients

    differences = []

    def refuse(_: torch.Tensor) -> bool:
        raise Read

    def both(model: list[Any], num_tokens: torch.Tensor, **options: Any) -> None:
        buffers = [buffer.grad_data for chunk in model for buffer in chunk.buffers]
        before = [copy.deepcopy(buffer) for buffer in buffers]
        finalize_model_grads(model, num_tokens.clone(), **options)
        wanted = [copy.deepcopy(buffer) for buffer in buffers]
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "__bool__", refuse)
            patch.setattr(torch.Tensor, "item", refuse)
            finish_gradients(model, num_tokens, **options)
        assert any(float(values.abs().max()) > 0 for values in wanted)
        differences.append(max(float((a - b).abs().max()) for a, b in zip(buffers, wanted, strict=True)))

    with pytest.MonkeyPatch.context() as patch:  # the process serves other tests too
        patch.setattr(step, "finish_gradients", both)
        train_all([sections])
    return differences


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, {}), (2, {"tensor": 2, "sequence_parallel": True}), (2, {"pipeline": 2}), (2, {})]
)
def test_gradients_are_megatrons_and_no_host_waits_for_them(
    ranks: int, parallel: dict[str, Any], tmp_path: Path, data_folder: Path
) -> None:
    sections = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 5}, parallel=parallel)
    for differences in run_distributed(ranks, "tests.training.test_gradients:compare", sections):
        assert differences == [0.0] * 5


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def compare_clipping(sections: dict[str, Any]) -> list[tuple[float, float, float, int]]:
    """Of every step: the norm, Megatron's, the largest difference of a clipped gradient from Megatron's, reads."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    from megasparse.training import step
    from megasparse.training.optimizer import clip_gradients, gradient_norm

    rows = []

    def both(optimizer: Any) -> float:
        [inner] = optimizer.chained_optimizers
        with Reads() as reads:
            norm = gradient_norm(optimizer)
        gradients = [parameter.grad for parameter in inner.get_parameters()]
        before = [gradient.clone() for gradient in gradients]
        clip_gradients(optimizer, norm)
        clipped = [gradient.clone() for gradient in gradients]
        for gradient, values in zip(gradients, before, strict=True):
            gradient.copy_(values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
            patch.setattr(clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
            wanted = float(inner.clip_grad_norm(inner.config.clip_grad))
        gap = max((float((a - b).abs().max() / b.abs().max()) for a, b in zip(clipped, gradients, strict=True)))
        rows.append((norm, wanted, gap, reads.count))
        return 0.0  # clipped by now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "gradient_norm", both)
        train_all([sections])
    return rows


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"distributed_optimizer": True}])
@pytest.mark.parametrize("clip", [0.25, 100.0])
def test_gradients_are_clipped_as_by_megatron_with_one_read(
    clip: float, parallel: dict[str, Any], tmp_path: Path, data_folder: Path
) -> None:
    sections = configuration(
        tmp_path / "run",
        str(data_folder / "a"),
        training={"steps": 5},
        optimizer={"clip_grad": clip},
        parallel=parallel,
    )
    for rows in run_distributed(2, "tests.training.test_gradients:compare_clipping", sections):
        assert len(rows) == 5
        for norm, wanted, gap, reads in rows:
            assert norm == pytest.approx(wanted, rel=1e-6)
            assert 0.25 < norm < 100  # so that the one limit clips and the other does not
            assert gap < 1e-6
            assert reads == 1
