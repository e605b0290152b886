"""Jobs for the tests of the pre-flight check: real processes, forked from one that has imported everything.

Every rank is a node of its own, n0, n1, ..., as srun would start it: one task a node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What srun sets for the task on node `rank` of a job of one task a node."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank), "SLURM_STEP_TASKS_PER_NODE": f"1(x{world})", "SLURMD_NODENAME": f"n{rank}",
        "SLURM_STEP_NODELIST": f"n[0-{world - 1}]", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "COLUMNS": "200",
    }  # fmt: skip


class Job:
    """One helper process; each `run` forks ranks from it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.preflight_job"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start(self, ranks: list[dict[str, Any]]) -> None:
        """Run `megasparse` with `arguments`, in directory `cwd`, with the environment `env`, for each of `ranks`.

        `code`: folder with another copy of the package to run, instead of the one under test.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(ranks) + "\n")
        self.process.stdin.flush()

    def results(self) -> list[tuple[int, str]]:
        """Exit code and output of each rank."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the helper process ended"
        return [(code, text) for code, text in json.loads(line)]

    def run(self, ranks: list[dict[str, Any]]) -> list[tuple[int, str]]:
        self.start(ranks)
        return self.results()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _rank(spec: dict[str, Any], log: Path) -> int:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(spec["cwd"])
    os.environ.update(spec["env"])
    if "code" in spec:
        for name in [name for name in sys.modules if name.split(".")[0] == "megasparse"]:
            del sys.modules[name]
        sys.path.insert(0, spec["code"])
    from megasparse import cli

    try:
        cli.main(spec["arguments"])
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    return 99


def _serve() -> None:
    import torch

    import megasparse.preflight
    import megasparse.training.distributed  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            specs, pids, results = json.loads(line), [], []
            for index, spec in enumerate(specs):
                pid = os.fork()
                if pid == 0:
                    code = _rank(spec, Path(folder) / str(index))
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
                pids.append(pid)
            for index, pid in enumerate(pids):
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                results.append((code, (Path(folder) / str(index)).read_text(errors="replace")))
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    _serve()
