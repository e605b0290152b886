import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megasparse.monitoring.record import Record, read_records
from megasparse.monitoring.sinks.jsonl import FILE_NAME, JsonlSink
from megasparse.monitoring.sinks.wandb import STATE_FILE, WandbSink, step_offset
from megasparse.small_files import read_json
from megasparse.training.signals import EXIT_NOT_FINITE, EXIT_REQUEUE
from tests.launch import free_port
from tests.monitoring.wandb_file import OfflineRun, offline_runs
from tests.monitoring.wandb_server import WandbServer


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, nothing outside the test's directory."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def record(step: int, attempt: int = 1) -> Record:
    return Record(step, 0.0, "train", {"loss/lm": 10.0 / step, "attempt": attempt, "sparsity/layer_0/path": "dense"})


def session(directory: Path, first: int, last: int, attempt: int = 1, **options: Any) -> WandbSink:
    """One process of a run: steps `first` to `last`, each written to both sinks."""
    jsonl = JsonlSink(directory, first - 1)
    history = read_records(directory / FILE_NAME)
    arguments = {"mode": "offline", "project": "tests", "resumed_step": first - 1, "history": history}
    sink = WandbSink(directory, **(arguments | options))
    for step in range(first, last + 1):
        jsonl.write(record(step, attempt))
        sink.write(record(step, attempt))
    jsonl.close()
    sink.close()
    return sink


def test_offline_file_holds_metrics_config_and_commit(tmp_path: Path) -> None:
    config = {"model": {"num_layers": 2}, "environment": {"world_size": 4}}
    sink = session(tmp_path, 1, 3, name="name", tags=["a"], config=config, git_commit="0123abcd")
    (directory,) = offline_runs(tmp_path)
    run = OfflineRun(directory)
    assert (run.id, run.project, run.commit) == (sink.run_id, "tests", "0123abcd")
    assert run.config["model"] == {"num_layers": 2}
    assert run.config["environment"] == {"world_size": 4}
    assert [row["_step"] for row in run.history] == [1, 2, 3]
    assert [row["loss/lm"] for row in run.history] == [10.0, 5.0, 10.0 / 3]
    assert run.history[0]["sparsity/layer_0/path"] == "dense"
    assert run.history[0]["progress/step"] == 1


def test_validation_joins_the_training_record_of_its_step(tmp_path: Path) -> None:
    sink = WandbSink(tmp_path, mode="offline", project="tests")
    sink.write(record(5))
    sink.write(Record(5, 0.0, "valid", {"eval/loss": 3.0}))
    sink.write(record(6))
    sink.close()
    run = OfflineRun(offline_runs(tmp_path)[0])
    assert [row["_step"] for row in run.history] == [5, 6]
    assert run.history[0]["eval/loss"] == 3.0
    assert run.history[0]["loss/lm"] == 2.0


def test_three_starts_and_a_rollback_leave_one_whole_run(tmp_path: Path) -> None:
    ids = {session(tmp_path, 1, 6, attempt=1).run_id}
    ids.add(session(tmp_path, 7, 9, attempt=2).run_id)
    ids.add(session(tmp_path, 5, 8, attempt=3).run_id)  # from the checkpoint of step 4
    assert len(ids) == 1
    (newest,) = offline_runs(tmp_path)  # earlier directories do not upload over it
    assert len(list((tmp_path / "wandb-superseded").glob("offline-run-*"))) == 2
    run = OfflineRun(newest)
    assert [(row["_step"], row["attempt"]) for row in run.history] == [
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 3), (6, 3), (7, 3), (8, 3),
    ]  # fmt: skip
    assert (tmp_path / "wandb" / "latest-run").resolve() == newest.resolve()


def test_wandb_sync_takes_the_newest_directory_alone(tmp_path: Path) -> None:
    session(tmp_path, 1, 2)
    session(tmp_path, 3, 4)
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    output = result.stdout + result.stderr
    (newest,) = offline_runs(tmp_path)
    assert "Would sync 1 run(s)" in output
    assert "Skipped" not in output
    (listed,) = [tmp_path / word for word in output.split() if word.endswith(".wandb")]
    assert listed.resolve() == next(newest.glob("run-*.wandb")).resolve()


def test_the_checkpoints_run_id_wins_over_the_directorys(tmp_path: Path) -> None:
    session(tmp_path, 1, 2)
    sink = session(tmp_path, 3, 4, run_id="fromckpt")
    assert sink.run_id == "fromckpt"
    assert read_json(tmp_path / STATE_FILE)["run_id"] == "fromckpt"


def test_a_moved_run_directory_keeps_the_id_of_the_checkpoint(tmp_path: Path) -> None:
    first = session(tmp_path / "a", 1, 2)
    second = session(tmp_path / "b", 3, 4, run_id=first.run_id)
    assert OfflineRun(offline_runs(tmp_path / "b")[0]).id == second.run_id == first.run_id


def test_a_killed_start_loses_nothing_that_metrics_jsonl_has(tmp_path: Path) -> None:
    """SIGKILL: the client never finishes its file; the next start rebuilds the run from metrics.jsonl."""
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.monitoring import test_wandb as t\n"
        "jsonl = t.JsonlSink(Path(sys.argv[1])); sink = t.WandbSink(Path(sys.argv[1]), mode='offline', project='p')\n"
        "for step in range(1, 6): jsonl.write(t.record(step)); sink.write(t.record(step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, timeout=120, check=False)
    run_id = read_json(tmp_path / STATE_FILE)["run_id"]
    sink = session(tmp_path, 5, 7, attempt=2)
    assert sink.run_id == run_id
    run = OfflineRun(offline_runs(tmp_path)[-1])
    assert [row["_step"] for row in run.history] == [1, 2, 3, 4, 5, 6, 7]


SLOW_START = """
import sys
from pathlib import Path
from wandb.sdk.lib.service import service_process
from megasparse.monitoring.sinks import wandb

core, slow = service_process.get_core_path(), Path(sys.argv[1]) / "core"
slow.write_text(f'#!/bin/sh\\nsleep 4\\nexec "{core}" "$@"\\n')
slow.chmod(0o755)
service_process.get_core_path = lambda: str(slow)
wandb.SERVICE_SECONDS = float(sys.argv[2])
wandb.WandbSink(Path(sys.argv[1]), mode="offline", project="p").close()
"""


@pytest.mark.parametrize(("patience", "ends"), [(1, "Failed to read port info after 1.0 seconds"), (60, "")])
def test_wandbs_process_may_take_long_to_start(tmp_path: Path, patience: int, ends: str) -> None:
    """As long as we say, not as W&B does."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", SLOW_START, str(tmp_path), str(patience)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode == 0) == (not ends), done.stderr
    assert ends in done.stderr


def test_without_a_login_the_run_goes_on_offline_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = session(tmp_path, 1, 2, mode="online")
    assert "the run goes on offline" in caplog.text
    assert OfflineRun(offline_runs(tmp_path)[0]).id == sink.run_id


def run_apart(script: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose W&B client reads the environment and may be broken."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", "from tests.monitoring.test_wandb import *\n" + script, str(directory)]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=root, timeout=120, check=False, capture_output=True, text=True, env=env)


def test_without_an_answer_from_the_server_the_run_goes_on_offline(tmp_path: Path) -> None:
    result = run_apart(
        "session(Path(sys.argv[1]), 1, 2, mode='online')",
        tmp_path,
        WANDB_BASE_URL=f"http://127.0.0.1:{free_port()}",
        WANDB_API_KEY="x" * 40,
        WANDB_INIT_TIMEOUT="2",
    )
    assert "the run goes on offline" in result.stderr
    assert result.returncode == 0, result.stderr
    assert len(OfflineRun(offline_runs(tmp_path)[0]).history) == 2


def test_what_a_run_did_offline_is_there_when_it_comes_online(tmp_path: Path) -> None:
    """Without a login for six steps, then with one, from the checkpoint of step 4."""
    run_apart("session(Path(sys.argv[1]), 1, 6, mode='online')", tmp_path)
    script = (
        "with WandbServer() as server:\n"
        "    os.environ.update(server.environment)\n"
        "    session(Path(sys.argv[1]), 5, 8, attempt=2, mode='online')\n"
        "    print([(row['_step'], row['progress/step'], row['attempt']) for row in server.history])\n"
    )
    result = run_apart(script, tmp_path)
    steps = [(step, step, 1 if step < 5 else 2) for step in range(1, 9)]
    assert result.stdout.splitlines()[-1:] == [str(steps)], result.stderr
    assert "rolled back" not in result.stderr
    assert offline_runs(tmp_path) == []  # nothing that `wandb sync` would put over it


def test_a_server_that_goes_away_does_not_hold_the_end_of_a_run(tmp_path: Path) -> None:
    """What it lacks then is on disk, and the command in the log uploads it."""
    script = (
        "import logging, time; from megasparse.monitoring.sinks import wandb as module\n"
        "logging.basicConfig(); module.FINISH_SECONDS = 1.0\n"
        "with WandbServer() as server:\n"
        "    os.environ.update(server.environment)\n"
        "    sink = WandbSink(Path(sys.argv[1]), mode='online', project='p')\n"
        "for step in range(1, 4): sink.write(record(step))\n"
        "began = time.monotonic(); sink.close(); print('closed after', time.monotonic() - began)\n"
    )
    result = run_apart(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert 1.0 <= float(result.stdout.split("closed after")[1]) < 30.0
    (advice,) = [line for line in result.stderr.splitlines() if "within 1 s" in line]
    command = advice.split("`")[1].split()
    with WandbServer() as server:
        environment = {**os.environ, **server.environment}
        subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env=environment,
            timeout=120,
            check=True,
            capture_output=True,
        )
    assert {row["progress/step"] for row in server.history} == {1, 2, 3}


@pytest.mark.parametrize("code", [EXIT_REQUEUE, EXIT_NOT_FINITE])
def test_a_run_that_gave_up_has_failed(code: int, tmp_path: Path) -> None:
    script = (
        "import types; from megasparse.monitoring.monitor import Monitor\n"
        "monitor = Monitor(); monitor._failing = []; folder = Path(sys.argv[1])\n"
        "monitor._sinks = [WandbSink(folder, mode='offline', project='p')]\n"
        f"monitor.on_end(types.SimpleNamespace(is_writer=False, exit_code={code}))\n"
    )
    assert run_apart(script, tmp_path).returncode == 0
    assert OfflineRun(offline_runs(tmp_path)[0]).exit_code == int(code == EXIT_NOT_FINITE)


def test_a_run_does_not_rely_on_the_process_of_wandb_of_the_program_that_started_it(tmp_path: Path) -> None:
    result = run_apart("session(Path(sys.argv[1]), 1, 2)", tmp_path, WANDB_SERVICE="3-1-unix-/tmp/none/socket")
    assert result.returncode == 0, result.stderr
    assert len(OfflineRun(offline_runs(tmp_path)[0]).history) == 2


def test_a_run_outlives_the_process_of_wandb(tmp_path: Path) -> None:
    """The kernel may choose it when memory is short; every later call to W&B fails then."""
    script = (
        "import logging, types, psutil; from megasparse.monitoring.monitor import Monitor\n"
        "logging.basicConfig(); monitor = Monitor(); monitor._failing = []; folder = Path(sys.argv[1])\n"
        "monitor._sinks = [WandbSink(folder, mode='offline', project='p'), JsonlSink(folder)]\n"
        "children = psutil.Process().children(recursive=True)\n"
        "for child in children: child.kill()\n"
        "psutil.wait_procs(children)\n"
        "for step in range(1, 6): monitor._write(record(step))\n"
        "monitor.on_end(types.SimpleNamespace(is_writer=False, exit_code=0))\n"
        "print('went on')\n"
    )
    result = run_apart(script, tmp_path)
    assert "went on" in result.stdout, result.stderr
    assert result.stderr.count("WandbSink: metrics are being lost") == 1
    assert [line.step for line in read_records(tmp_path / FILE_NAME)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("last_step", "offset", "starting_step", "resumed_step", "expected"),
    [
        (0, 0, 0, 0, 0),  # a new run
        (100, 0, 101, 100, 0),  # stopped and resumed where it was
        (100, 0, 96, 100, 0),  # killed: the server lacks the last points
        (95, 0, 96, 100, 0),  # the last record lies before the checkpoint
        (100, 0, 101, 60, 40),  # rolled back: iteration 61 becomes W&B step 101
        (100, 40, 141, 100, 40),  # later resumed without a rollback: W&B steps go on
        (100, 40, 141, 80, 60),  # rolled back again
        (0, 0, 141, 100, 40),  # the directory was lost: the server's word counts
    ],
)
def test_online_steps_after_a_rollback_are_new_ones(
    last_step: int, offset: int, starting_step: int, resumed_step: int, expected: int
) -> None:
    """W&B drops points whose step it has passed; nothing of a run is to be dropped."""
    result = step_offset({"last_step": last_step, "offset": offset}, starting_step, resumed_step)
    assert result == expected
    assert resumed_step + 1 + result >= starting_step
