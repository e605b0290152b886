"""Submitting tiny runs with the launcher, and reading what they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.launch import run_distributed
from tests.slurm.cluster import Cluster, wait_for
from tests.training.cases import VOCABULARY, write_data

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


class Workplace:
    """A working directory, with a checkout of the project, data and a configuration of two layers in it.

    Jobs run `paced_python`: with `hold=STEP` the ranks of one attempt wait before that step until the test or the
    launcher has acted, so that no test depends on how fast the machine is.
    """

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.checkout = directory / "the checkout"
        self.checkout.mkdir()
        for name in ("megasparse", "tests"):
            (self.checkout / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "slurm", self.checkout / "slurm")
        (self.checkout / "slurm" / "site.sh").write_text(
            f"export MEGASPARSE_PYTHON='{self.checkout}/tests/slurm/paced_python' OMP_NUM_THREADS=1\n"
            f"export MEGASPARSE_TEST_PYTHON='{sys.executable}' GLOO_SOCKET_IFNAME=lo\n"
            "((${SLURM_RESTART_COUNT:-0} < 2)) || MEGASPARSE_PREFLIGHT=0\n"
            'export MEGASPARSE_PREFLIGHT="${MEGASPARSE_PREFLIGHT:-0}"\n'
        )
        write_data(directory / "text", documents=200, seed=1)
        self.config = directory / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(configuration()))

    def run_directory(self, name: str) -> Path:
        """Where the run of this name writes."""
        return Path(os.path.normpath(self.directory / "runs" / name))  # `runs/../other` is there without `runs`

    def command(self, *arguments: str) -> str:
        """What `megasparse ARGUMENTS` prints where one submits."""
        done = subprocess.run(
            [sys.executable, "-m", "megasparse", *arguments], cwd=self.directory, capture_output=True, text=True,
            env={**self.cluster.environment, "PYTHONPATH": str(ROOT)}, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def alone(self, *arguments: str) -> str:
        """What `megasparse ARGUMENTS` prints as one process without SLURM."""
        return str(run_distributed(1, "tests.slurm.runs:megasparse", str(self.directory), list(arguments))[0])

    def submit(
        self,
        name: str,
        *overrides: str,
        nodes: int = 2,
        hold: int = 0,
        flags: tuple[str, ...] = (),
        script: str = "pretrain.sbatch",
        config: str = "tiny.yaml",
        **environment: str,
    ) -> str:
        """Submits the launcher; the job's number."""
        answer = subprocess.run(
            [
                "sbatch", "--parsable", f"--job-name={name}", f"--nodes={nodes}", "--ntasks-per-node=1",
                "--cpus-per-task=1", "--gpus-per-node=0", "--mem=100", "--oversubscribe", "--time=30", *flags,
                str(self.checkout / "slurm" / script), config, *overrides,
            ],
            cwd=self.directory, capture_output=True, text=True, timeout=60,
            env={**self.cluster.environment, "MEGASPARSE_TEST_HOLD": str(hold), **environment},
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def wait_for_hold(self, name: str, ranks: int = 2, seconds: float = 400.0) -> dict[int, int]:
        """Waits until all ranks hold; their process ids by rank."""
        directory = self.run_directory(name)

        def holding() -> dict[int, int]:
            files = {int(path.suffix[1:]): path for path in directory.glob("holding.*")}
            return {rank: int(path.read_text()) for rank, path in files.items()} if len(files) == ranks else {}

        return dict(wait_for(f"ranks of {name} at the step to hold", holding, seconds, lambda: self.log(name)))

    def release(self, name: str) -> None:
        """Lets the ranks of a run go on."""
        (self.run_directory(name) / "go").touch()

    def metrics(self, name: str) -> dict[int, dict[str, Any]]:
        """Training metrics by step; each step is there once."""
        result: dict[int, dict[str, Any]] = {}
        for line in (self.run_directory(name) / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["split"] == "train":
                assert record["step"] not in result
                result[record["step"]] = record
        return result

    def ends(self, name: str) -> list[dict[str, Any]]:
        """The records of requeues.jsonl."""
        return [json.loads(line) for line in (self.run_directory(name) / "requeues.jsonl").read_text().splitlines()]

    def output(self, name: str) -> str:
        """What the batch scripts of a job name printed, before they had a run directory."""
        paths = sorted(self.directory.glob(f"slurm-{name}-*.out"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def log(self, name: str) -> str:
        """All merged logs of a run, and `output`."""
        paths = sorted(self.run_directory(name).glob("logs/*/job.log"))
        return "\n".join([*(path.read_text(errors="replace") for path in paths), self.output(name)])


def megasparse(directory: str, arguments: list[str]) -> str:
    """What `megasparse ARGUMENTS` prints in that directory, in a worker of `run_distributed`."""
    from megasparse.cli import build_parser

    with contextlib.chdir(directory), contextlib.redirect_stdout(io.StringIO()) as output:
        args = build_parser().parse_args(arguments)
        assert args.run(args) == 0
    return output.getvalue()


def configuration() -> dict[str, Any]:
    """Two layers of width 64."""
    return {
        "model": {
            "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4,
            "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 16,
        },
        "sparsity": {"l1": {"mode": "target", "target_l0": 20, "start_step": 2, "coeff": 1e-3}},
        "data": {"blend": "text", "sequence_length": 32, "num_workers": 0, "split": "90,10,0"},
        "training": {
            "micro_batch_size": 1, "global_batch_size": 4, "steps": STEPS, "precision": "fp32", "eval_steps": 0,
        },
        "optimizer": {"lr": 3e-3, "schedule": {"kind": "cosine", "warmup_steps": 4}},
        "checkpoint": {"interval": 4},
        "logging": {"interval": 1, "report": False, "console": False, "wandb": {"mode": "disabled"}},
    }  # fmt: skip


def differences(
    left: dict[int, dict[str, Any]], right: dict[int, dict[str, Any]], tolerance: float = 0.0
) -> list[tuple[int, str, float, float]]:
    """Steps at which loss, gradient norm, learning rate or an L1 coefficient differ."""
    assert sorted(left) == sorted(right) == list(range(1, STEPS + 1))
    names = ("loss/lm", "grad_norm", "lr", "l1/layer_0/coeff", "l1/layer_1/coeff", "progress/tokens")
    return [
        (step, name, left[step][name], right[step][name])
        for step in left
        for name in names
        if not math.isclose(left[step][name], right[step][name], rel_tol=tolerance, abs_tol=0.0)
    ]


def alive(pid: int) -> bool:
    """Whether a process is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
