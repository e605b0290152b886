"""How a run starts: refused configurations, `resume`, `load`; and `evaluate` of what it saved."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from megatron.core import parallel_state

from megasparse.cli import main
from megasparse.config import ConfigError, dump_config, parse_config
from megasparse.training.evaluate import _cache_beside
from tests.launch import free_port, run_distributed
from tests.training.cases import configuration
from tests.training.forked import ROOT, Helper


@pytest.mark.parametrize(
    ("sections", "ranks", "message"),
    [
        ({"parallel": {"tensor": 2}}, 1, "the world of 1 ranks is not a multiple of tensor x pipeline x context"),
        ({"training": {"micro_batch_size": 3}}, 1, "not a multiple of micro_batch_size x data-parallel size"),
        ({}, 3, "not a multiple of micro_batch_size x data-parallel size = 1 x 3"),
    ],
)
def test_layouts_that_do_not_divide_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], ranks: int, message: str
) -> None:
    from megasparse.training.loop import pretrain

    if ranks > 1:
        place = {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
    cfg = parse_config(configuration(tmp_path / "run", "data", **sections))
    with pytest.raises(ConfigError, match=message):
        pretrain(cfg)
    assert not dist.is_initialized()
    assert not (tmp_path / "run").exists()


def test_what_may_pass_ends_in_a_code_that_launchers_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not 2, with which a job ends for good: here nobody answers, then the storage goes away in a save."""
    config = tmp_path / "config.yaml"
    content = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 6})
    config.write_text(yaml.safe_dump(content))
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    with monkeypatch.context() as environment:
        for name, value in {**place, "MASTER_PORT": str(free_port())}.items():
            environment.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            main(["pretrain", str(config), "parallel.timeout_minutes=0.01"])
    assert "cannot meet the others" in capsys.readouterr().err
    assert left.value.code == 1

    rename = Path.rename

    def stale(self: Path, target: Path) -> Path:
        if ".partial-" not in self.name:
            return rename(self, target)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    with monkeypatch.context() as storage:
        storage.setattr(Path, "rename", stale)
        with pytest.raises(SystemExit) as left:
            main(["pretrain", str(config)])
    assert "Stale file handle" in capsys.readouterr().err
    assert left.value.code == 1
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def evaluate_checkpoint(run: str, overrides: list[str]) -> Any:
    from megasparse.training.evaluate import evaluate

    return evaluate(run, overrides)


def test_resume_load_and_evaluate(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    run = configuration(
        tmp_path / "run", str(data_folder / "a"), training={"steps": 6, "eval_steps": 2}, checkpoint={"interval": 3}
    )
    must = {**run, "checkpoint": {"resume": "must"}}
    result = helper.run(must)
    assert result["exit"] == [1]
    assert "checkpoint.resume: must, but there is no checkpoint in" in result["output"]

    trained = helper.run(run)
    assert trained["exit"] == [0], trained["output"]
    at_end = trained["records"][0]["evaluations"]["6"]

    never = {**run, "checkpoint": {"resume": "never"}}
    result = helper.run(never)
    assert result["exit"] == [1]
    assert "never, but" in result["output"]
    assert "holds checkpoints (the newest of step 6)" in result["output"]

    # Nothing is left to do: a finished run that is started again only says so.
    again = helper.run(run)
    assert again["exit"] == [0], again["output"]
    assert "nothing to do: training.steps is 6, and the run has done 6" in again["output"]
    assert "changed since" not in again["output"]
    assert again["records"][0]["steps"] == {}
    assert again["records"][0]["digest"] == trained["records"][0]["digest"]

    # A new run from the weights of the first begins at step 1 where the first ended.
    start = configuration(
        tmp_path / "tuned",
        str(data_folder / "a"),
        training={"steps": 6, "eval_steps": 2},
        optimizer={"lr": 1e-12, "min_lr": 0.0},
        checkpoint={"load": str(tmp_path / "run")},
    )
    tuned = helper.run(start)
    assert tuned["exit"] == [0], tuned["output"]
    assert sorted(int(step) for step in tuned["records"][0]["steps"]) == [1, 2, 3, 4, 5, 6]
    assert tuned["records"][0]["evaluations"]["6"] == pytest.approx(at_end, rel=1e-5)

    # `evaluate` agrees with the validation of the training, at another layout too.
    for world, overrides in ((1, []), (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"])):
        target = "tests.training.test_run:evaluate_checkpoint"
        for metrics in run_distributed(world, target, str(tmp_path / "run"), overrides):
            assert metrics == pytest.approx(at_end, rel=1e-5)


def test_evaluate_writes_to_no_run_but_the_one_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to where its configuration once said: it may have been moved, or be another user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000006"
    checkpoint.mkdir(parents=True)
    assert _cache_beside(run, checkpoint) == tmp_path / "own" / "megasparse"
    (run / "cache").mkdir()
    for named in (run, run / "checkpoints", checkpoint):
        assert _cache_beside(named, checkpoint) == run / "cache"


def test_changed_settings_are_told_or_refused(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """A refused start leaves config.yaml as it was, as `megasparse status` and people read it."""
    run = configuration(tmp_path / "run", str(data_folder / "a"), training={"steps": 6})
    assert helper.run(run)["exit"] == [0]
    before = (tmp_path / "run" / "config.yaml").read_text()
    refusals = {
        "model.hidden_size: 16 there, 32 here": ("model", {"hidden_size": 32}),
        "smaller than before: the run has read 24 samples in 6 steps": (
            "training",
            {"steps": 8, "global_batch_size": 2},
        ),
    }
    for message, (section, keys) in refusals.items():
        refused = helper.run({**run, section: {**run[section], **keys}})
        assert refused["exit"] == [1]
        assert message in refused["output"]
        assert (tmp_path / "run" / "config.yaml").read_text() == before
    changed = helper.run({
        **run, "training": {**run["training"], "steps": 8, "global_batch_size": 8}, "optimizer": {"lr": 1e-3}
    })  # fmt: skip
    assert changed["exit"] == [0], changed["output"]
    for text in ("training.steps: 6 -> 8", "training.global_batch_size: 4 -> 8", "optimizer.lr: 0.003 -> 0.001"):
        assert f"changed since step_00000006: {text}" in changed["output"]
    assert sorted(changed["records"][0]["steps"]) == ["7", "8"]


CRASH = """
import sys
from megasparse.config import load_config
from megasparse.training.callbacks import Callback
from megasparse.training.loop import pretrain

class Crash(Callback):
    def on_step_end(self, state, metrics):
        raise MemoryError("no memory left")

pretrain(load_config(sys.argv[1]), [Crash()])
"""


def test_an_error_ends_the_process_and_its_data_loader(tmp_path: Path, data_folder: Path) -> None:
    """As a rank that stays would keep its GPU, and all others waiting."""
    cfg = parse_config(configuration(tmp_path / "run", str(data_folder / "a"), data={"num_workers": 2}))
    (tmp_path / "run.yaml").write_text(dump_config(cfg))
    command = [sys.executable, "-c", CRASH, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "MemoryError: no memory left" in done.stderr


DETERMINISTIC = """
import os, sys, torch
from megasparse.config import load_config
from megasparse.training.loop import pretrain

assert pretrain(load_config(sys.argv[1])) == 0
assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
print(os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"], os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""


def test_a_deterministic_run_allows_nothing_else(tmp_path: Path, data_folder: Path) -> None:
    """Whatever the environment asked of Transformer Engine. In a process of its own: torch keeps the mode."""
    cfg = parse_config(configuration(tmp_path / "run", str(data_folder / "a"), training={"deterministic": True}))
    (tmp_path / "run.yaml").write_text(dump_config(cfg))
    command = [sys.executable, "-c", DETERMINISTIC, str(tmp_path / "run.yaml")]
    environment = {**os.environ, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 :4096:8"
