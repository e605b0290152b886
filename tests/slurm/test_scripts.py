"""The shell scripts themselves: what shellcheck says of them, what they have in common, the containers' flags."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megasparse.data.documents import DEFAULT_INCLUDE
from tests.slurm.runs import ROOT

LAUNCHERS = sorted((ROOT / "slurm").glob("*.sbatch"))


def test_shellcheck_finds_nothing() -> None:
    scripts = [*LAUNCHERS, *ROOT.glob("slurm/*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci" / "run"]
    scripts += [ROOT / "tests" / "slurm" / name for name in ("paced_python", "apptainer")]
    found = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_launcher_finds_the_checkout_in_the_same_way() -> None:
    """SLURM runs a copy of a launcher, which can source nothing before it knows where the checkout is."""
    lookups = [re.search(r"^root=.*?^source .*?$", path.read_text(), re.MULTILINE | re.DOTALL) for path in LAUNCHERS]
    assert len({found and found.group() for found in lookups}) == 1
    assert None not in lookups


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer", "docker"])
def test_containers(runtime: str, tmp_path: Path) -> None:
    script = (
        f"set -euo pipefail; root='{ROOT}'; source \"$root/slurm/common.sh\"; set_up; "
        'printf "%s\\n" "${srun_arguments[@]}" -- "${python[@]}"'
    )
    work = tmp_path / "work place"
    work.mkdir()
    site = tmp_path / "site.sh"
    site.touch()
    environment = {
        "PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "MEGASPARSE_CONTAINER": "/an image.sqsh",
        "MEGASPARSE_CONTAINER_RUNTIME": runtime, "MEGASPARSE_MOUNTS": "/data:/data", "SLURM_CPUS_PER_TASK": "4",
        "MEGASPARSE_SITE": str(site),
    }  # fmt: skip
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if runtime == "docker":
        assert done.returncode == 2
        assert "MEGASPARSE_CONTAINER_RUNTIME=docker: pyxis or apptainer" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    arguments, python = done.stdout.strip().split("\n--\n")
    mounts = f"{ROOT}:{ROOT},{work}:{work},/data:/data"
    common = ["--export=ALL", "--cpu-bind=none", "--cpus-per-task=4"]
    if runtime == "pyxis":
        container = ["--container-image=/an image.sqsh", f"--container-mounts={mounts}", f"--container-workdir={work}"]
        assert arguments.splitlines() == [*container, *common]
        assert python.splitlines() == ["python"]
    else:
        assert arguments.splitlines() == common
        inside = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(work), "/an image.sqsh", "python"]
        assert python.splitlines() == inside


def bash(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a piece of the launchers in their shell mode, with as little environment as `sbatch --export=NONE`."""
    command = ["bash", "-c", f"set -euo pipefail; root='{ROOT}'; {script}", "bash", *arguments]
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_the_first_of_many_failures_is_found(tmp_path: Path) -> None:
    """Thousands of ranks may fail together, where storage does or they cannot meet."""
    (tmp_path / "exit").mkdir()
    for rank in range(3000):
        code = 0 if rank > 2990 else 1
        (tmp_path / "exit" / f"rank_{rank:05d}").write_text(f"{1763776800.5 - rank} {rank} {code} node{rank:04d}\n")
    (definition,) = re.findall(r"^first_failure\(\).*$", (ROOT / "slurm" / "pretrain.sbatch").read_text(), re.MULTILINE)
    assert bash(f"{definition}; logs=/none; failure=$(first_failure); echo none").stdout == "none\n"
    for _ in range(10):  # which end of a pipe is closed first is a matter of luck
        found = bash(f'{definition}; logs=$1; failure=$(first_failure); echo "$failure"', str(tmp_path))
        assert (found.returncode, found.stdout) == (0, "1763773810.5 2990 1 node2990\n"), found.stderr


def test_ranks_of_thousands_of_nodes_find_the_first(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/bash\n[[ $2 == hostnames ]] && seq -f n%05g 1 5000 || echo "NodeName=$4 NodeAddr=10.0.0.1 Port=1"\n'
    )
    scontrol.chmod(0o755)
    script = 'source "$root/slurm/common.sh"; set_rendezvous; echo "$MASTER_ADDR"'
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[00001-05000]"}
    for _ in range(10):
        found = bash(script, **environment)
        assert (found.returncode, found.stdout) == (0, "10.0.0.1\n"), found.stderr


def test_a_controller_that_does_not_answer_ends_no_job(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/bash\n[[ $2 == hostnames ]] && echo n1 || { echo "Unable to contact" >&2; exit 1; }\n')
    scontrol.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1"}
    found = bash('source "$root/slurm/common.sh"; set_rendezvous; echo "$MASTER_ADDR"', **environment)
    assert (found.returncode, found.stdout) == (0, "n1\n"), found.stderr


def test_a_site_file_may_be_plain_bash_and_what_fails_in_it_is_named(tmp_path: Path) -> None:
    site = tmp_path / "the site.sh"
    script = 'source "$root/slurm/common.sh"; set_up; echo "$OURS" "${srun_arguments[0]}"; shopt -qo nounset'

    def start(content: str) -> subprocess.CompletedProcess[str]:
        site.write_text(content)
        return bash(script, MEGASPARSE_SITE=str(site))

    started = start("export OURS=/opt/lib:$NOT_SET\nsrun_arguments=(--mpi=none)\n")
    assert (started.returncode, started.stdout) == (0, "/opt/lib: --mpi=none\n"), started.stderr
    for content, reason in (
        ("load() { cat /no/file; }\nload toolkit\necho on\n", "code 1 of: cat /no/file"),
        ("[[ -d /no/folder ]] && export TMPDIR=/no/folder\n", "code 1 of: its last command"),
    ):
        failed = start(content)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.endswith(f"error: {site}: {reason}\n")


@pytest.mark.parametrize(
    ("task", "count", "least", "most", "files"),
    [(1, 3, 0, 2, "1 4"), (0, 1, 0, 0, "0 1 2 3 4"), (3, 2, 3, 7, None), (1, 2, 1, 2, None), (2, 2, 0, 2, None)],
)
def test_an_array_that_would_lose_or_repeat_files_is_refused(
    task: int, count: int, least: int, most: int, files: str | None, tmp_path: Path
) -> None:
    for name in ("site.sh", *(f"{number}.txt" for number in range(5))):
        (tmp_path / name).touch()
    array = {"ID": task, "COUNT": count, "MIN": least, "MAX": most}
    environment = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
    done = bash(
        'MEGASPARSE_ROOT=$root bash "$root/slurm/preprocess.sbatch" shard "$1" --tokenizer words',
        str(tmp_path), MEGASPARSE_PYTHON="echo", MEGASPARSE_SITE=str(tmp_path / "site.sh"), **environment,
    )  # fmt: skip
    if files is None:
        assert done.returncode == 2
        assert f"{count} tasks from {least} to {most}" in done.stderr
        assert done.stdout == ""
    else:
        assert re.findall(r"/(\d)\.txt", done.stdout) == files.split()


def test_an_array_takes_the_files_that_preprocess_takes_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "site.sh").touch()
    taken = [f"a{pattern[1:]}" for pattern in DEFAULT_INCLUDE]
    for name in (*taken, "a.png", "a.txt.zip", "atxt", "a.zst", "a.gz.txt.gz.part"):
        (tmp_path / name).touch()
    done = bash(
        'MEGASPARSE_ROOT=$root bash "$root/slurm/preprocess.sbatch" shard "$1" --tokenizer words',
        str(tmp_path), MEGASPARSE_PYTHON="echo", MEGASPARSE_SITE=str(tmp_path / "site.sh"),
    )  # fmt: skip
    assert set(re.findall(rf"{tmp_path}/(\S+)", done.stdout)) == set(taken), done.stderr


def test_an_array_takes_every_file_that_is_named(tmp_path: Path) -> None:
    """Whatever its name: `megasparse preprocess` does, or says why not. Folders are looked through beside them."""
    (tmp_path / "site.sh").touch()
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.json.gz", "c.py", "folder/d.txt", "folder/e.py"):
        (tmp_path / name).touch()
    names = ("c.py", "b.json.gz", "folder", "a.txt")
    everything = ["a.txt", "b.json.gz", "c.py", "folder/d.txt"]
    for inputs, expected in ((names, everything), (names[:2], everything[1:3])):
        done = bash(
            'MEGASPARSE_ROOT=$root bash "$root/slurm/preprocess.sbatch" shard "$@" --tokenizer words',
            *(str(tmp_path / name) for name in inputs),
            MEGASPARSE_PYTHON="echo", MEGASPARSE_SITE=str(tmp_path / "site.sh"),
        )  # fmt: skip
        assert re.findall(rf"{tmp_path}/(\S+)", done.stdout) == expected, done.stderr


def test_a_task_whose_shard_is_there_ends_well(tmp_path: Path) -> None:
    """So that an array which is submitted again, and what depends on it, can succeed."""
    for name in ("site.sh", "a.txt", "shard-00000-of-00001.idx"):
        (tmp_path / name).touch()
    for flags, expected in (((), "is there already"), (("--overwrite",), "megasparse preprocess")):
        done = bash(
            'MEGASPARSE_ROOT=$root bash "$root/slurm/preprocess.sbatch" "$@" --tokenizer words',
            str(tmp_path / "shard"), str(tmp_path / "a.txt"), *flags,
            MEGASPARSE_PYTHON="echo", MEGASPARSE_SITE=str(tmp_path / "site.sh"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


class FakeSlurm:
    """Stands for SLURM's commands around slurm/pretrain.sbatch, and for its look at the configuration.

    Args:
        srun: what the command does, in bash; its parent is the launcher.
    """

    def __init__(self, folder: Path, srun: str) -> None:
        self.folder, self.run = folder, folder / "a run"
        node = "NodeName=n1 NodeAddr=localhost ReqNodeList=(null)"
        answers = {
            "srun": srun,
            "squeue": "echo RUNNING",
            "scontrol": f'[[ $2 == hostnames ]] && tr , "\\n" <<<"$3" || echo "{node}"',
            "python": f"printf '%s\\n' '{self.run}' '{self.run}/checkpoints'",
        }
        for name, answer in answers.items():
            (folder / name).write_text(f"#!/bin/bash\n{answer}\n")
            (folder / name).chmod(0o755)
        (folder / "site.sh").touch()

    def launch(self, job: int, attempt: int, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the launcher."""
        return bash(
            'cd "$1"; MEGASPARSE_ROOT=$root bash "$root/slurm/pretrain.sbatch" config.yaml', str(self.folder),
            PATH=f"{self.folder}:{os.environ['PATH']}", MEGASPARSE_SITE=str(self.folder / "site.sh"),
            SLURM_JOB_ID=str(job), SLURM_RESTART_COUNT=str(attempt), SLURM_JOB_NAME="megasparse",
            SLURM_JOB_PARTITION="gpu", **{"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", **environment},
        )  # fmt: skip

    def attempt(self, job: int, attempt: int, **environment: str) -> dict[str, Any]:
        """Runs the launcher; how it says that the attempt ended."""
        done = self.launch(job, attempt, **environment)
        ends = self.run / "requeues.jsonl"
        assert ends.is_file(), done.stdout + done.stderr
        end = json.loads(ends.read_text().splitlines()[-1])
        assert (end["job"], end["attempt"]) == (job, attempt), done.stdout + done.stderr
        return dict(end)


def test_a_job_step_that_ends_without_a_word_of_any_rank_is_tried_again(tmp_path: Path) -> None:
    """Up to MEGASPARSE_MAX_FAILURES times; a job that is submitted anew may fail as often."""
    slurm = FakeSlurm(tmp_path, srun="exit 1")
    settings = {"MEGASPARSE_PREFLIGHT": "0", "MEGASPARSE_MAX_FAILURES": "2"}
    ends = [slurm.attempt(*which, **settings) for which in ((1, 0), (1, 1), (2, 0))]
    assert [end["requeued"] for end in ends] == [True, False, True]
    assert all(end["reason"].startswith("srun ended with code 1 and no rank wrote down why") for end in ends)


def test_a_signal_before_the_first_step_sends_the_job_back_to_the_queue(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path, srun="kill -USR1 $PPID\nsleep 0.5\nexit 1")
    end = slurm.attempt(1, 0)
    assert (end["requeued"], end["reason"]) == (True, "SIGUSR1 before the first step")


@pytest.mark.parametrize(("launcher", "cpus"), [("srun", 12), ("torchrun", 96)])
def test_all_ranks_of_a_node_share_all_its_processors(launcher: str, cpus: int, tmp_path: Path) -> None:
    """SLURM confines a step to what it asks for; of repeated flags the last counts."""
    slurm = FakeSlurm(tmp_path, srun='printf "%s\\n" "$@" >arguments; exit 1')
    settings = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_ON_NODE": "96", "MEGASPARSE_LAUNCHER": launcher}
    slurm.attempt(1, 0, MEGASPARSE_PREFLIGHT="0", **settings)
    flags = [text for text in (tmp_path / "arguments").read_text().splitlines() if text.startswith("--cpus-per-task=")]
    assert flags[-1] == f"--cpus-per-task={cpus}"


def test_a_job_that_is_cancelled_while_it_waits_for_another_lets_the_other_train(tmp_path: Path) -> None:
    """Both have the same run directory; a file `stop` in it would end the one that trains."""
    slurm = FakeSlurm(tmp_path, srun='kill -TERM $PPID; sleep 0.5; cat "$MEGASPARSE_STOP_FILE"')
    (tmp_path / "squeue").write_text("#!/bin/bash\necho COMPLETING\n")
    done = slurm.launch(2, 0, MEGASPARSE_PREFLIGHT="0")
    assert "not requeued: SIGTERM before the first step; SLURM is ending this job" in done.stdout
    assert "\nSIGTERM\n" in done.stdout, "what its own ranks look for"
    assert not (slurm.run / "stop").exists()


def test_a_preemption_before_the_first_step_is_no_failure(tmp_path: Path) -> None:
    """SLURM sends SIGTERM to the ranks alone, which it ends while they start; torchrun sends it to the others of one
    that failed."""
    write = "printf '1.%s %s %s n1\\n' $rank $rank {} >\"a run/logs/{}/exit/rank_0000$rank\""
    settings = {"MEGASPARSE_PREFLIGHT": "0", "MEGASPARSE_MAX_FAILURES": "1", "SLURM_NTASKS_PER_NODE": "2"}
    preempted = f"for rank in 0 1; do {write.format(143, '1-0')}; done; exit 143"
    end = FakeSlurm(tmp_path, srun=preempted).attempt(1, 0, **settings)
    assert (end["requeued"], end["reason"]) == (True, "SIGTERM before the first step")
    failed = f"rank=0; {write.format(143, '2-0')}; rank=1; {write.format(3, '2-0')}; exit 3"
    end = FakeSlurm(tmp_path, srun=failed).attempt(2, 0, **settings)
    assert (end["requeued"], end["reason"].partition(";")[0]) == (False, "rank 0 failed with code 143")
    lost = f"rank=0; {write.format(143, '3-0')}; exit 143"  # of rank 1's end nothing is known: its node may have died
    end = FakeSlurm(tmp_path, srun=lost).attempt(3, 0, **settings)
    assert (end["requeued"], end["reason"].partition(";")[0]) == (False, "rank 0 failed with code 143")


def test_another_attempt_goes_on_whatever_the_run_says_of_checkpoints(tmp_path: Path) -> None:
    """`checkpoint.resume: never` is meant for those of other jobs."""
    slurm = FakeSlurm(tmp_path, srun='printf "%s\\n" "$@" >arguments; exit 1')
    for attempt in (0, 1):
        slurm.attempt(1, attempt, MEGASPARSE_PREFLIGHT="0")
        arguments = (tmp_path / "arguments").read_text().splitlines()
        assert arguments[-1] == ("checkpoint.resume=auto" if attempt else "config.yaml")


@pytest.mark.parametrize(
    ("full", "content", "code", "said"),
    [
        ("requeues.jsonl", {"code": 75, "reason": "SIGTERM", "step": 5}, 75, "requeue 2 of at most 100: SIGTERM after"),
        ("requeues.jsonl", {"code": 0, "reason": "done", "step": 9}, 0, "done after step 9"),
        ("crashes", None, 1, "a node or its slurmd is gone; failures cannot be counted in"),
    ],
)
def test_a_full_disk_does_not_end_the_launcher_without_a_word(
    full: str, content: dict[str, Any] | None, code: int, said: str, tmp_path: Path
) -> None:
    """What the run came to counts, saved as it is elsewhere; what follows the job waits for its code."""
    end = "exit 1" if content is None else f"echo '{json.dumps(content)}' >'a run/exit.json'"
    slurm = FakeSlurm(tmp_path, srun=end)
    slurm.run.mkdir()
    if full == "crashes":  # is read, too, and /dev/full has no end
        (slurm.run / full).mkdir()
    else:
        (slurm.run / full).symlink_to("/dev/full")
    done = slurm.launch(1, 1, MEGASPARSE_PREFLIGHT="0")
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout


def test_a_full_disk_does_not_change_the_code_of_a_rank(tmp_path: Path) -> None:
    """A rank that has saved and leaves must not end those that still write (srun --kill-on-bad-exit)."""
    (tmp_path / "exit").mkdir()
    (tmp_path / "exit" / ".rank_00000").symlink_to("/dev/full")
    done = bash('bash "$root/slurm/rank.sh" "$1" bash -c "echo trained; exit 75"', str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("trained\n")
    assert "exit/rank_00000 cannot be written" in done.stdout


@pytest.mark.parametrize(
    ("hosts", "requeued", "reason"),
    [
        (["n1", "n2"], True, "the check failed on all nodes: what they share may be slow or away"),
        (["n2"], False, "the check of the nodes failed, see above; no other nodes for n2"),
        ([], False, "the check of the nodes failed, see above"),
    ],
)
def test_nodes_are_not_to_blame_for_what_all_of_them_lack(
    hosts: list[str], requeued: bool, reason: str, tmp_path: Path
) -> None:
    """A file system that is away for minutes would end the job, or have it avoid all of its healthy nodes."""
    report = json.dumps({"ok": False, "hosts": hosts, "checks": []}, indent=1)
    slurm = FakeSlurm(tmp_path, srun=f"echo '{report}' >\"${{@: -1}}\"; exit 1")
    (tmp_path / "sinfo").write_text("#!/bin/bash\nprintf 'n1\\nn2\\n'\n")
    (tmp_path / "sinfo").chmod(0o755)
    end = slurm.attempt(1, 0, SLURM_JOB_NODELIST="n1,n2", SLURM_JOB_NUM_NODES="2")
    assert (end["requeued"], end["reason"]) == (requeued, reason)
