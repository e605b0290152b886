"""What the file system shows or refuses to one rank alone ends all of them, or the others would wait for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megasparse.config import ConfigError, Problem, parse_config
from megasparse.ranks import on_first_rank
from megasparse.training.loop import pretrain
from tests.launch import run_distributed
from tests.training.cases import configuration


def train(data: dict[str, Any], function: str, effect: Any, rank: int = 1) -> str:
    """Why a run ends in which `function` does `effect` on one rank, on this rank."""
    with mock.patch(function, **effect) if dist.get_rank() == rank else mock.patch.dict({}):
        return observed(data)


def observed(data: dict[str, Any]) -> str:
    """Why a run ends that the project's own monitor watches, on this rank."""
    try:
        return f"ended with {pretrain(parse_config(data))}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


NO_SPACE = {"side_effect": OSError(28, "No space left on device", "a file")}
TRAIN = "tests.training.test_one_rank_fails:train"


@pytest.mark.parametrize(
    ("function", "rank"),
    [
        ("megasparse.training.datasets._tokens", 1),
        ("megasparse.training.datasets._dataset_config", 0),
        ("numpy.save", 0),
        ("numpy.load", 1),
        ("megasparse.training.checkpoint.start_save_helper", 1),
    ],
)
def test_what_fails_at_the_start_or_in_a_save(tmp_path: Path, data_folder: Path, function: str, rank: int) -> None:
    data = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 5})
    for reason in run_distributed(2, TRAIN, data, function, NO_SPACE, rank, timeout=40):
        assert reason.startswith("StorageError: ")
        assert f"rank {rank} on " in reason
        assert "No space left on device" in reason


def test_a_node_of_its_own_disk_cannot_start_the_process_that_builds_its_indices(
    tmp_path: Path, data_folder: Path
) -> None:
    data = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 5})
    for reason in run_distributed(2, "tests.training.test_one_rank_fails:train_apart", data, str(tmp_path), timeout=40):
        assert reason.startswith("StorageError: rank 1 on ")
        assert "No space left on device" in reason


def train_apart(data: dict[str, Any], folder: str) -> str:
    """`train` where every rank is the first of a node with a disk of its own."""
    place = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_DISK": f"{folder}/node{os.environ['RANK']}"}
    data["data"]["cache_dir"] = "$NODE_DISK/cache"
    with mock.patch.dict(os.environ, place):
        return train(data, "megasparse.training.datasets.tempfile.TemporaryDirectory", NO_SPACE)


@pytest.mark.parametrize("name", ["exit.json", "run.json.tmp"])
def test_what_rank_0_cannot_write_at_the_start_ends_all(tmp_path: Path, data_folder: Path, name: str) -> None:
    data = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 5})
    (tmp_path / "run" / name).mkdir(parents=True)  # where a file should be
    for reason in run_distributed(2, "tests.training.test_one_rank_fails:observed", data, timeout=40):
        assert reason.startswith("StorageError: rank 0 on ")
        assert name in reason


@pytest.mark.parametrize(
    ("name", "left"), [("exit.json.tmp", "ended with 0"), ("report.html", "ended with 0"), ("stop", "ended with 75")]
)
def test_what_rank_0_cannot_write_at_the_end_ends_nothing(
    tmp_path: Path, data_folder: Path, name: str, left: str
) -> None:
    """All is saved; that the run is over the others learn without it."""
    data = configuration(
        tmp_path / "run", str(data_folder / "a"), training={"steps": 5}, logging={"jsonl": True, "report": True}
    )
    data["logging"]["wandb"] = {"mode": "disabled"}
    (tmp_path / "run" / name).mkdir(parents=True)
    assert run_distributed(2, "tests.training.test_one_rank_fails:observed", data, timeout=40) == [left] * 2


class Opaque(Exception):
    """As some libraries have them: its pickle cannot be read."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def raise_on_rank_0(kind: str) -> str:
    def action() -> None:
        if kind == "opaque":
            raise Opaque("this", "that")
        raise ConfigError([Problem("a.b", "wrong", "do better", 3), Problem("c", "too")], host_specific=True)

    try:
        on_first_rank(action)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def test_every_exception_reaches_the_other_ranks() -> None:
    target = "tests.training.test_one_rank_fails:raise_on_rank_0"
    for text in run_distributed(2, target, "opaque", timeout=40):
        assert text.startswith("RuntimeError: rank 0 on ")
        assert text.endswith("Opaque: this and that")
    own, told = run_distributed(2, target, "config", timeout=40)
    assert own == told == "ConfigError: 2 problems in the configuration\na.b = 3: wrong\n    -> do better\nc: too"


def test_what_a_rank_wrote_cannot_be_read_back(tmp_path: Path, data_folder: Path) -> None:
    data = configuration(tmp_path / "run", str(data_folder / "a"), checkpoint={"interval": 1})
    effect = {"side_effect": OSError(5, "Input/output error")}
    target, function = TRAIN, "megasparse.training.checkpoint.checksum"
    for reason in run_distributed(2, target, data, function, effect):
        assert reason.startswith(f"StorageError: a checkpoint cannot be written to {tmp_path / 'run'}/checkpoints (")
        assert "rank 1 on " in reason
        assert "Input/output error" in reason
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_rank_sees_no_checkpoints(tmp_path: Path, data_folder: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    data = configuration(tmp_path / "run", str(data_folder / "a"), checkpoint={"resume": "never"})
    for reason in run_distributed(2, TRAIN, data, "megasparse.start_checks.list_checkpoints", {"return_value": []}):
        assert reason.startswith("ConfigError")
        assert "the newest of step 1" in reason


def test_a_rank_reads_other_data_than_before(tmp_path: Path, data_folder: Path) -> None:
    """As with an index that was left on the disk of its node."""
    data = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 6}, checkpoint={"interval": 6})
    run_distributed(2, "tests.training.cases:train_all", [data])
    data["training"]["steps"] = 8
    target, function = TRAIN, "megasparse.training.data._hash"
    for reason in run_distributed(2, target, data, function, {"return_value": "that of another sample"}):
        assert reason.startswith("DataChangedError: rank 1 on ")
        assert "sample 0, which the run has already seen, is not what it was" in reason
