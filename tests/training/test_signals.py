"""Told to stop, by whatever means, all ranks finish the step, save and leave with the documented code."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megasparse.config import dump_config, parse_config
from megasparse.monitoring.record import read_records
from megasparse.training import signals
from megasparse.training.callbacks import TrainState
from megasparse.training.checkpoint_files import find_checkpoints, read_latest
from megasparse.training.signals import EXIT_NOT_FINITE, EXIT_REQUEUE, StopReason, StopWatcher
from tests.launch import run_distributed
from tests.training.cases import configuration, train_all
from tests.training.forked import ROOT, Helper


def case(tmp_path: Path, data: Path, **checkpoint: Any) -> dict[str, Any]:
    return configuration(
        tmp_path / "run",
        str(data / "a"),
        training={"steps": 8, "global_batch_size": 4},
        checkpoint={"interval": 2, **checkpoint},
        data={"num_workers": 2},
    )


def assert_stopped(tmp_path: Path, result: dict[str, Any], world: int, reason: str, at: int) -> None:
    assert result["exit"] == [EXIT_REQUEUE] * world, result["output"]
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    # A signal that comes after the step's decision takes effect one step later, on all ranks alike.
    assert left["step"] in (at, at + 1)
    assert left == {"code": EXIT_REQUEUE, "requeue": True, "reason": reason, "step": left["step"]}
    assert read_latest(tmp_path / "run" / "checkpoints") == f"step_{left['step']:08d}"
    for record in result["records"]:
        assert max(int(step) for step in record["steps"]) == left["step"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name
)
def test_signal_to_one_rank_stops_all_and_the_run_goes_on(
    tmp_path: Path, data_folder: Path, helper: Helper, number: signal.Signals
) -> None:
    """The second of two ranks; but for SIGUSR1 its data loader and checkpoint helper processes get it as well."""
    at = {"step": 5, "rank": 1, "number": int(number), "group": number != signal.SIGUSR1}
    result = helper.run(case(tmp_path, data_folder), world=2, signal_at=at)
    assert_stopped(tmp_path, result, 2, number.name, 5)
    assert f"stopped ({number.name}) after step" in result["output"]
    if number == signal.SIGTERM:
        result = helper.run(case(tmp_path, data_folder), world=2)
        assert result["exit"] == [0, 0], result["output"]
        assert "resumed from" in result["output"]
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["requeue"] is False


def test_a_killed_run_leaves_no_word_of_the_start_before(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """Launchers would take an old `exit.json` for how this start has ended."""
    run = case(tmp_path, data_folder)
    assert helper.run(run, stop_file_at=2)["exit"] == [EXIT_REQUEUE]
    assert (tmp_path / "run" / "exit.json").exists()
    assert helper.run(run, kill_after=5)["exit"] == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "exit.json").exists()


def test_a_second_ctrl_c_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first asks to stop; what comes with it, from a launcher, counts as the same one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    try:
        with signals.StopWatcher(run_directory=tmp_path) as stop:
            with pytest.raises(KeyboardInterrupt):  # while the run starts
                signal.raise_signal(signal.SIGINT)
            stop.catch_interrupts()
            signal.raise_signal(signal.SIGINT)
            assert stop.local_reason() == StopReason.SIGINT
            now = 100.5
            signal.raise_signal(signal.SIGINT)
            assert capfd.readouterr().err.count("saving a checkpoint") == 1
            now = 102.0
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with signals.StopWatcher(run_directory=tmp_path) as stop:
            stop.catch_interrupts()
            signal.raise_signal(signal.SIGINT)
            assert stop.local_reason() == StopReason.NONE
    finally:
        signal.signal(signal.SIGINT, before)


def own_terminal() -> None:
    """Standard input becomes the terminal whose end a process hears of, also where the tests run under nohup."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_closed_terminal_stops_the_run(tmp_path: Path, data_folder: Path) -> None:
    """Though everything that it prints from then on is an error."""
    sections = {"training": {"steps": 100_000}, "logging": {"console": True, "jsonl": False, "report": False}}
    cfg = parse_config(configuration(tmp_path / "run", str(data_folder / "a"), **sections))
    (tmp_path / "run.yaml").write_text(dump_config(cfg))
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "megasparse", "pretrain", str(tmp_path / "run.yaml")], cwd=ROOT,
        stdin=end, stdout=end, stderr=end, env={**os.environ, "TERM": "xterm"}, start_new_session=True,
        preexec_fn=own_terminal,
    )  # fmt: skip
    os.close(end)
    shown = b""
    try:
        while b"loss" not in shown:
            shown += os.read(terminal, 4096)
        os.close(terminal)
        assert process.wait(timeout=60) == EXIT_REQUEUE, shown.decode()
    finally:
        process.kill()  # it would train for hours
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert left["reason"] == "SIGHUP"
    assert read_latest(tmp_path / "run" / "checkpoints") == f"step_{left['step']:08d}"


def test_nohup_lets_a_run_go_on_without_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopWatcher() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.local_reason() == StopReason.NONE
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_limit_stops(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    run = case(tmp_path, data_folder)
    run["training"]["time_limit_minutes"] = 1e-4
    result = helper.run(run)
    assert_stopped(tmp_path, result, 1, "TIME_LIMIT", 1)


@pytest.mark.parametrize(
    ("answer", "goes_on"),
    [("date -d @$END +%FT%T", True), ("date +%FT%T", False), ("echo N/A", False), ("exit 1", False)],
)
def test_a_job_whose_time_limit_was_raised_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, goes_on: bool
) -> None:
    """What SLURM told the job at its start is then too early."""
    started = int(time.time())
    (tmp_path / "squeue").write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/asked\n{answer}\n')
    (tmp_path / "squeue").chmod(0o755)
    for name, value in {
        "SLURM_JOB_END_TIME": started + 121, "SLURM_JOB_ID": 7, "END": started + 3600,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    first, other = StopWatcher(run_directory=tmp_path), StopWatcher()
    assert first.local_reason() == StopReason.NONE
    monkeypatch.setattr(signals.time, "time", lambda: started + 2.0)
    expected = StopReason.NONE if goes_on else StopReason.TIME_LIMIT
    assert [first.local_reason(), first.local_reason()] == [expected] * 2
    assert (tmp_path / "asked").read_text() == "--noheader --jobs=7 --format=%e\n"
    monkeypatch.setattr(signals.time, "time", lambda: started + 3481.0)
    assert first.local_reason() == StopReason.TIME_LIMIT
    assert other.local_reason() == StopReason.NONE, "the first rank's word is all ranks'"


def test_the_end_of_an_array_s_last_task_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id is also that of the array: asked for that, squeue tells of all tasks."""
    answer = 'date -d @5000000000 +%FT%T; [[ "$*" == *--jobs=7_3* ]] || echo N/A'
    (tmp_path / "squeue").write_text(f"#!/bin/bash\n{answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert signals.slurm_job_end() == 5e9


def test_stop_file_stops_and_is_removed(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    result = helper.run(case(tmp_path, data_folder), stop_file_at=3)
    assert_stopped(tmp_path, result, 1, "STOP_FILE", 3)
    assert not (tmp_path / "run" / "stop").exists()


def test_the_launcher_s_file_stops_and_is_left_to_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASPARSE_STOP_FILE", str(tmp_path / "signalled"))
    first, other = StopWatcher(run_directory=tmp_path), StopWatcher()
    assert first.local_reason() == StopReason.NONE
    (tmp_path / "signalled").touch()
    assert (first.local_reason(), other.local_reason()) == (StopReason.STOP_FILE, StopReason.NONE)
    first.clear_stop_file()
    assert (tmp_path / "signalled").exists()


def test_a_run_that_is_told_to_stop_in_its_last_step_is_done(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """Requeued, it would wait for its nodes and load its checkpoint for nothing. Nobody would validate it then."""
    run = case(tmp_path, data_folder)
    run["training"] |= {"eval_interval": 3, "eval_steps": 2}
    result = helper.run(run, stop_file_at=7)
    assert result["exit"] == [0], result["output"]
    assert list(result["records"][0]["evaluations"]) == ["3", "6", "8"]
    assert "told to stop in the last step, which is saved" in result["output"]
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert left == {"code": 0, "requeue": False, "reason": "done", "step": 8}
    assert read_latest(tmp_path / "run" / "checkpoints") == "step_00000008"
    assert not (tmp_path / "run" / "stop").exists()


def stop_with_a_slow_end(data: dict[str, Any]) -> tuple[int, float]:
    """Stops after a step; rank 0 takes two seconds to end, as W&B may. Returns (exit code, when this rank was done)."""
    from megasparse.training.callbacks import Callback
    from megasparse.training.loop import pretrain

    class Slow(Callback):
        def on_step_end(self, state: TrainState, metrics: dict[str, Any]) -> None:
            if state.is_writer:
                (state.run_directory / "stop").touch()

        def on_end(self, state: TrainState) -> None:
            assert state.exit_code == EXIT_REQUEUE
            time.sleep(2.0 if state.is_writer else 0.0)

    begun = time.monotonic()
    return pretrain(parse_config(data), [Slow()]), time.monotonic() - begun


def test_no_rank_leaves_before_rank_0_has_said_all(tmp_path: Path, data_folder: Path) -> None:
    """torchrun kills the others half a minute after the first that leaves with a code that is not 0."""
    data = configuration(tmp_path / "run", str(data_folder / "a"))
    results = run_distributed(2, "tests.training.test_signals:stop_with_a_slow_end", data)
    assert [code for code, _ in results] == [EXIT_REQUEUE] * 2
    assert abs(results[0][1] - results[1][1]) < 1.5


def train_and_stop_in_validation(data: dict[str, Any], stop_file: str | None) -> dict[str, Any]:
    """The record of a run which, while its second batch is validated, finds a stop file. `validated`: the newest
    checkpoint and whether the run had an exit file, before each batch."""
    from megasparse.training.heartbeat import Heartbeat

    batches: list[tuple[str | None, bool]] = []
    directory = Path(data["run"]["directory"])

    def at(self: Heartbeat, step: int, where: str) -> None:
        if where == "validation":
            batches.append((read_latest(directory / "checkpoints"), (directory / "exit.json").exists()))
            if len(batches) == 2 and stop_file is not None:
                Path(stop_file).touch()
        original(self, step, where)

    original = Heartbeat.at
    with mock.patch.object(Heartbeat, "at", at):
        [record] = train_all([data])
    return {**record, "validated": batches}


def test_a_long_validation_does_not_outlast_the_time_that_is_left(tmp_path: Path, data_folder: Path) -> None:
    """It ends after a batch, without a result, and the step before it is saved."""
    run = case(tmp_path, data_folder, interval=8)
    run["training"] |= {"eval_interval": 3, "eval_steps": 4}
    target = "tests.training.test_signals:train_and_stop_in_validation"
    stopped = run_distributed(2, target, run, str(tmp_path / "run" / "stop"))
    for record in stopped:
        assert (record["code"], record["evaluations"]) == (EXIT_REQUEUE, {})
        assert max(record["steps"]) == 3
        assert 2 <= len(record["validated"]) <= 3
    assert stopped[0]["saved"] == ["step_00000003"]
    for record in run_distributed(2, target, run, None):
        assert record["code"] == 0
        assert list(record["evaluations"]) == [6, 8]


def test_the_last_validation_is_done_when_all_is_saved(tmp_path: Path, data_folder: Path) -> None:
    """Where the run is told to stop in it, it begins anew behind the checkpoint: a kill then costs nothing else."""
    run = case(tmp_path, data_folder, interval=8)
    run["training"] |= {"eval_interval": 0, "eval_steps": 4}
    target = "tests.training.test_signals:train_and_stop_in_validation"
    first, second = run_distributed(2, target, run, str(tmp_path / "run" / "stop"))
    assert [(record["code"], list(record["evaluations"])) for record in (first, second)] == [(0, [8])] * 2
    *stopped, _, _, _, _ = first["validated"]
    assert set(stopped) == {(None, False)}
    assert set(first["validated"][-4:]) == {("step_00000008", True)}
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0


def test_a_file_system_that_answers_with_an_error_stops_nothing() -> None:
    assert StopWatcher(run_directory=Path("n" * 300)).local_reason() == StopReason.NONE


def test_keep_last_and_keep_every(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    run = case(tmp_path, data_folder, interval=1, keep_last=2, keep_every=3, async_save=True)
    result = helper.run(run)
    assert result["exit"] == [0], result["output"]
    assert [found.step for found in find_checkpoints(tmp_path / "run" / "checkpoints")] == [8, 7, 6, 3]
    assert result["records"][0]["saved"] == [f"step_{step:08d}" for step in range(1, 9)]


def test_steps_that_are_not_finite_are_skipped_then_given_up(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """One bad gradient is skipped and counted; a model that stays broken ends the run, naming step and rank."""
    run = case(tmp_path, data_folder)
    run["training"]["steps"] = 30
    result = helper.run(run, world=2, bad_gradient_at=3, broken_from=6)
    assert result["exit"] == [EXIT_NOT_FINITE] * 2, result["output"]
    steps = result["records"][0]["steps"]
    assert steps["3"]["optim/skipped_steps"] == 1
    assert steps["4"]["optim/skipped_steps"] == 1
    assert steps["5"]["loss/lm"] < 10
    assert "step 3: no update" in result["output"]
    assert "step 15: no update: loss nan" in result["output"]
    assert "loss not finite on ranks [0, 1]" in result["output"]
    assert "in a row without an update: giving up" in result["output"]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == EXIT_NOT_FINITE
    assert [found.step for found in find_checkpoints(tmp_path / "run" / "checkpoints")] == [4, 2]
    assert all(record["digest"] for record in result["records"]), "observers end their files"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_checkpoint_of_what_may_be_broken_takes_no_other_s_place(
    tmp_path: Path, data_folder: Path, helper: Helper, asynchronous: bool
) -> None:
    """A run that is told to stop, or has its last step, while steps are skipped: it cannot be gone on with."""
    run = case(tmp_path, data_folder, interval=4, keep_last=1, async_save=asynchronous)
    run["training"]["steps"] = 12
    root = tmp_path / "run" / "checkpoints"
    result = helper.run(run, broken_from=6, stop_file_at=7)
    assert_stopped(tmp_path, result, 1, "STOP_FILE", 8)
    stopped_at = json.loads((tmp_path / "run" / "exit.json").read_text())["step"]
    assert [found.step for found in find_checkpoints(root)] == [stopped_at, 4]
    result = helper.run(run)
    assert result["exit"] == [0], result["output"]
    assert result["records"][0]["steps"]["12"]["optim/skipped_steps"] == 12 - 5
    assert [found.step for found in find_checkpoints(root)] == [12, stopped_at, 4]


@pytest.mark.parametrize("stop_file_at", [2, None], ids=["stopped", "to the last step"])
def test_a_run_without_any_update_saves_nothing(
    tmp_path: Path, data_folder: Path, helper: Helper, stop_file_at: int | None
) -> None:
    run = case(tmp_path, data_folder, interval=1)
    run["training"]["steps"] = 6
    result = helper.run(run, broken_from=1, stop_file_at=stop_file_at)
    assert result["exit"] == [EXIT_NOT_FINITE if stop_file_at is None else EXIT_REQUEUE], result["output"]
    assert not list(find_checkpoints(tmp_path / "run" / "checkpoints"))
    told = "none of the 6 steps made an update" if stop_file_at is None else "the same command starts again"
    assert told in result["output"]
    assert helper.run(run)["exit"] == [0]


def test_one_step_with_infinite_activations_leaves_no_trace(tmp_path: Path, data_folder: Path, helper: Helper) -> None:
    """Where every neuron seems to fire, and where dead ones were to get rows that depend on the layer's inputs."""
    run = case(tmp_path, data_folder, interval=5)
    run["training"]["steps"] = 12
    run["sparsity"] = {
        "l1": {"mode": "target", "target_l0": 8, "coeff": 1e-3},
        "reinit": {"every": 5, "until_fraction": 1.0},
        "dead_window_steps": 8,
    }
    run["logging"] |= {"jsonl": True, "interval": 1}
    result = helper.run(run, bad_input_at=5, monitor=True)
    assert result["exit"] == [0], result["output"]
    [record] = result["records"]
    assert record["steps"]["12"]["optim/skipped_steps"] == 1
    assert record["steps"]["6"]["l1/layer_0/coeff"] == record["steps"]["5"]["l1/layer_0/coeff"]
    assert record["steps"]["10"]["dead_neurons/layer_0/reinitialised"] >= 2
    assert record["saved"] == ["step_00000010", "step_00000012"]
    records = {record.step: record.metrics for record in read_records(tmp_path / "run" / "metrics.jsonl")}
    assert records[5]["sparsity/layer_3/l1"] is None
    assert records[6]["sparsity/layer_3/l1"] > 0
