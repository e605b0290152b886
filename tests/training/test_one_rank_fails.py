"""What the file system shows or refuses to one rank alone ends all of them, or the others would wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.launch import run_distributed
from tests.training.cases import configuration, train_all


def train(data: dict[str, Any], function: str, effect: Any) -> str:
    """Why a run ends in which `function` does `effect` on rank 1, on this rank."""
    with mock.patch(function, **effect) if dist.get_rank() == 1 else mock.patch.dict({}):
        try:
            train_all([data])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "trained"


def test_what_a_rank_wrote_cannot_be_read_back(tmp_path: Path, data_folder: Path) -> None:
    data = configuration(tmp_path / "run", str(data_folder / "a"), checkpoint={"interval": 1})
    effect = {"side_effect": OSError(5, "Input/output error")}
    target, function = "tests.training.test_one_rank_fails:train", "megasparse.training.checkpoint.checksum"
    for reason in run_distributed(2, target, data, function, effect):
        assert reason.startswith(f"StorageError: a checkpoint cannot be written to {tmp_path / 'run'}/checkpoints (")
        assert "rank 1 on " in reason
        assert "Input/output error" in reason
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_rank_sees_no_checkpoints(tmp_path: Path, data_folder: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    data = configuration(tmp_path / "run", str(data_folder / "a"), checkpoint={"resume": "never"})
    target, function = "tests.training.test_one_rank_fails:train", "megasparse.training.loop.checkpoint_files"
    for reason in run_distributed(2, target, data, f"{function}.list_checkpoints", {"return_value": []}):
        assert reason.startswith("ConfigError")
        assert "the newest of step 1" in reason


def test_a_rank_reads_other_data_than_before(tmp_path: Path, data_folder: Path) -> None:
    """As with an index that was left on the disk of its node."""
    data = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 6}, checkpoint={"interval": 6})
    run_distributed(2, "tests.training.cases:train_all", [data])
    data["training"]["steps"] = 8
    target, function = "tests.training.test_one_rank_fails:train", "megasparse.training.data._hash"
    for reason in run_distributed(2, target, data, function, {"return_value": "that of another sample"}):
        assert reason.startswith("DataChangedError: rank 1 on ")
        assert "sample 0, which the run has already seen, is not what it was" in reason
