"""`megasparse launch` and `megasparse status`."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megasparse.slurm.launch import LAUNCHERS, LaunchFileError, read_job, render, submit
from megasparse.slurm.status import Status, StatusError, print_status, status_of
from megasparse.training.signals import write_exit_file
from tests.slurm.runs import ROOT


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_rendered_script_has_the_flags_once_and_the_arguments_quoted(tmp_path: Path) -> None:
    job = read_job(
        write(
            tmp_path / "job.yaml",
            {
                "job": "pretrain", "name": "a run", "arguments": ["a config.yaml", "run.name=it's"],
                "sbatch": {"nodes": 4, "exclusive": False, "comment": "two words"},
                "environment": {"NCCL_DEBUG": "WARN"},
            },
        )
    )  # fmt: skip
    script = render(job)
    head = script[: script.index("# megasparse launch")]
    assert head.count("--nodes=") == 1
    assert "#SBATCH --nodes=4\n" in head
    assert "--exclusive" not in head
    assert "#SBATCH '--comment=two words'\n" in head
    printed = script[script.index("set -- ") :].splitlines()[0]
    code = f"{printed}; printf '%s\\n' \"$@\""
    shown = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["a config.yaml", "run.name=it's"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_times_need_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("job: pretrain\nsbatch: {time: 24:00:00, begin: 10:30}\n")
    script = render(read_job(tmp_path / "job.yaml"))
    assert "#SBATCH --time=24:00:00\n" in script
    assert "#SBATCH --begin=10:30\n" in script


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS.glob("*.sbatch")), ids=lambda path: path.stem)
def test_every_launcher_renders(launcher: Path, tmp_path: Path) -> None:
    job = read_job(write(tmp_path / "job.yaml", {"job": launcher.stem, "sbatch": {"time": "1:00"}}))
    assert render(job).count("#SBATCH --time=") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"job": "pretrain", "argument": []}, "argument"),
        ({"job": "pretrian"}, "pretrain"),
        ({"job": "pretrain", "then": [{"job": "nothing"}]}, "nothing"),
        ([{"job": "pretrain"}], "job.yaml: Input should be"),
        ({"job": "pretrain", "name": "a/b"}, "name: String should match"),
        ({"job": "pretrain", "environment": {"A B": 1}}, "environment.A B.*: String should match"),
    ],
)
def test_mistakes_in_the_job_file_are_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchFileError, match=message):
        read_job(write(tmp_path / "job.yaml", content))


def test_every_job_of_a_chain_keeps_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = [{"job": "evaluate", "arguments": ["runs/a", f"training.eval_steps={steps}"]} for steps in (5, 50)]
    job = read_job(write(tmp_path / "job.yaml", {"job": "pretrain", "name": "a", "then": judge}))
    log = tmp_path / "log"
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nwc -l < "{log}"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    submitted = submit(job, tmp_path / "jobs", after="9")
    assert [number for number, _ in submitted] == ["1", "2", "3"]
    scripts = [script for _, script in submitted]
    assert len(set(scripts)) == 3
    lines = [re.findall("^set -- .*$", script.read_text(), re.MULTILINE) for script in scripts]
    assert lines[1:] == [["set -- runs/a training.eval_steps=5"], ["set -- runs/a training.eval_steps=50"]]
    dependencies = [line.split()[1] for line in log.read_text().splitlines()]
    assert dependencies == [f"--dependency=afterok:{number}" for number in ("9", "1", "1")]
    (tmp_path / "file").touch()
    with pytest.raises(LaunchFileError, match="file: scripts cannot be written"):
        submit(job, tmp_path / "file")


def test_a_refused_link_of_a_chain_does_not_hide_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who submits the chain again would have two jobs of the same run."""
    job = read_job(write(tmp_path / "job.yaml", {"job": "pretrain", "name": "a", "then": [{"job": "evaluate"}]}))
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\n[ "$#" = 2 ] && echo 41 || { echo "invalid account" >&2; exit 1; }\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    first, second = (tmp_path / "jobs" / name for name in ("a-pretrain.sbatch", "evaluate-evaluate.sbatch"))
    with pytest.raises(LaunchFileError) as caught:
        submit(job, tmp_path / "jobs")
    assert str(caught.value) == (
        f"sbatch {second}: invalid account\nSubmitted before it, and still in the queue: 41 ({first})"
    )


def test_the_example_is_valid() -> None:
    assert [child.job for child in read_job(ROOT / "slurm" / "job.example.yaml").then] == ["evaluate", "convert"]


def write_run(run: Path, steps: int = 100) -> None:
    """A run that made 10 steps, 2 s each, and a pause of an hour."""
    (run / "logs" / "77-0").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"training": {"steps": steps}, "logging": {"directory": None}}))
    lines = []
    for step in range(1, 11):
        moment = 1000.0 + 2 * step + (3600 if step > 5 else 0)
        lines.append({"step": step, "time": moment, "split": "train", "loss/lm": 3.0 - step / 10,
                      "throughput/tokens_per_second": 512.0})  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    end = {"time": 1, "job": 77, "attempt": 0, "requeued": True, "reason": "SIGUSR1 after step 5", "nodes": "n1"}
    (run / "requeues.jsonl").write_text(json.dumps(end) + "\n")


def test_status_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert status_of(tmp_path, now=4650.0) == Status(
        run=str(tmp_path), job="77", state="requeued, not known to SLURM now", reason="SIGUSR1 after step 5",
        nodes="n1", requeues=1, last_end="SIGUSR1 after step 5", hang=None, step=10, steps=100, loss=2.0,
        skipped_steps=0, tokens_per_second=512.0, eta_seconds=180.0, seconds_a_step=2.0, seconds_since_step=30.0,
        checkpoint=None, seconds_since_checkpoint=None, log=str(tmp_path / "logs" / "77-0" / "job.log"),
    )  # fmt: skip


def test_status_reads_past_what_a_full_disk_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    monkeypatch.setenv("PATH", "")
    whole = (tmp_path / "requeues.jsonl").read_text()
    last = whole.replace("SIGUSR1 after step 5", "SIGTERM after step 9")
    (tmp_path / "requeues.jsonl").write_text(whole + whole[:60] + last + whole[:60])
    status = status_of(tmp_path, now=4650.0)
    assert (status.requeues, status.last_end) == (2, "SIGTERM after step 9")


def test_status_is_of_the_job_that_trains_not_of_one_that_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    (tmp_path / "logs" / "78-0").mkdir()
    os.utime(tmp_path / "logs" / "77-0", (1000, 1000))
    monkeypatch.setenv("PATH", "")
    assert status_of(tmp_path, now=4650.0).job == "78"
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"process 12 on n1, SLURM job 77 (run directory {tmp_path})\n")
        lock.flush()
        status = status_of(tmp_path, now=4650.0)
    assert (status.job, status.state, status.eta_seconds) == ("77", "running", 180.0)
    assert status.log == str(tmp_path / "logs" / "77-0" / "job.log")


def test_status_of_a_run_that_stopped_without_slurm(tmp_path: Path) -> None:
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "requeues.jsonl").unlink()
    write_exit_file(tmp_path, 75, "SIGINT", 10)
    status = status_of(tmp_path, now=4650.0)
    assert (status.state, status.reason, status.eta_seconds) == ("stopped", "SIGINT after step 10", None)
    write_exit_file(tmp_path, 75, "SIGINT", 14)  # records are not of every step
    assert status_of(tmp_path, now=4650.0).step == 14
    write_exit_file(tmp_path, 65, "step 10: no update\nthe last ten were skipped", 10)
    status = status_of(tmp_path, now=4650.0)
    assert (status.state, status.reason) == ("ended", "step 10: no update")
    os.utime(tmp_path / "exit.json", (1000, 1000))  # of the start before
    status = status_of(tmp_path, now=4650.0)
    assert (status.state, status.reason, status.eta_seconds) == ("not known to SLURM", None, 180.0)


def test_status_of_a_run_without_slurm_whose_process_lives_and_then_is_killed(tmp_path: Path) -> None:
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "requeues.jsonl").unlink()
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(f"process 4711 on n1 (run directory {tmp_path})", file=lock, flush=True)
        status = status_of(tmp_path, now=4650.0)
        assert (status.state, status.reason, status.eta_seconds) == ("running", "process 4711 on n1", 180.0)
    status = status_of(tmp_path, now=4650.0)
    assert (status.state, status.reason, status.eta_seconds) == ("not running", None, None)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000100\n")  # a later start, refused, removed exit.json
    assert status_of(tmp_path, now=4650.0).state == "done"


def test_status_tells_what_a_look_in_the_night_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it gets on and who keeps it from that, how it ended before, what is saved, where to read on."""
    write_run(tmp_path)
    checkpoint = tmp_path / "elsewhere" / "latest"
    checkpoint.parent.mkdir()
    checkpoint.write_text("step_00000008\n")
    os.utime(checkpoint, (4050.0, 4050.0))
    config = {"training": {"steps": 100}, "checkpoint": {"directory": str(checkpoint.parent)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "hang.json").write_text(json.dumps({"reason": "rank 3 on n2: no sign of life", "hosts": "n2"}))
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        record = {"step": 11, "time": 4622.0, "split": "train", "loss/lm": None, "optim/skipped_steps": 3}
        metrics.write(json.dumps(record) + "\n")
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '77|RUNNING|None|n[1-2]'\n")
    squeue.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        print_status(status_of(tmp_path, now=4650.0))
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: job 77: RUNNING",
        "  HANG      rank 3 on n2: no sign of life",
        "  nodes     n[1-2]",
        "  requeued  1 times",
        "  last end  SIGUSR1 after step 5",
        "  step      11 of 100",
        "  loss      not finite",
        "  skipped   3 steps, whose gradients were not finite",
        "  ETA       0:02:58, at the pace of the last steps",
        "  last step 0:00:28 ago; a step takes 2 s",
        "  saved     step_00000008, 0:10:00 ago",
        f"  log       {tmp_path}/logs/77-0/job.log",
    ]


def test_status_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(StatusError, match="not the directory of a run"):
        status_of(tmp_path, now=0.0)


def test_status_tells_of_all_runs_before_what_is_no_run(tmp_path: Path) -> None:
    for name in ("a", "c"):
        write_run(tmp_path / name)
    (tmp_path / "b").mkdir()  # as runs/jobs of `megasparse launch` in `runs/*`
    command = [sys.executable, "-m", "megasparse", "status", "--json", *(str(tmp_path / name) for name in "abc")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert [Path(json.loads(line)["run"]).name for line in done.stdout.splitlines()] == ["a", "c"]
    assert (done.returncode, done.stderr) == (
        2, f"megasparse: {tmp_path}/b: not the directory of a run (no config.yaml, no logs)\n",
    )  # fmt: skip


def test_status_of_the_last_task_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SLURM answers, asked for job 77, which is both the last task of an array and the array."""
    write_run(tmp_path / "run")
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path))
    for state, eta in (("RUNNING", 180.0), ("FAILED", None)):  # who has failed gets nowhere
        rows = ("79|COMPLETED|None|n1", f"77|{state}|None|n2", "78|RUNNING|None|n3")
        squeue.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
        squeue.chmod(0o755)
        status = status_of(tmp_path / "run", now=4650.0)
        assert (status.state, status.nodes, status.eta_seconds) == (state, "n2", eta)
