"""The command in processes forked from one that has imported torch and Megatron: a start costs no imports.

Several side by side are the ranks of a job. `transformers` and the client of the Hugging Face hub are imported by the
command itself: they read the environment when they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from tests.launch import fork

ROOT = Path(__file__).resolve().parent.parent


class Commands:
    """One helper process; each call forks from it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.commands"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __call__(self, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        """`megasparse ARGUMENTS`, as one process."""
        return self.side_by_side([(arguments, environment)])[0]

    def side_by_side(
        self, commands: list[tuple[tuple[Any, ...], dict[str, str]]]
    ) -> list[subprocess.CompletedProcess[str]]:
        """Several at once, of arguments and environment each."""
        specs = [{"arguments": list(map(str, words)), "env": env, "apart": True} for words, env in commands]
        answers = self._run(specs)
        return [
            subprocess.CompletedProcess(spec["arguments"], *answer) for spec, answer in zip(specs, answers, strict=True)
        ]

    def job(self, ranks: list[dict[str, Any]]) -> list[tuple[int, str]]:
        """Exit code and output of each of `ranks`: `arguments`, in directory `cwd`, with the environment `env`.

        `code`: folder with another copy of the package to run, instead of the one under test.
        """
        return [(code, output) for code, output, _ in self._run(ranks)]

    def _run(self, specs: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(specs) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the helper process ended"
        return [(code, output, errors) for code, output, errors in json.loads(line)]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _command(spec: dict[str, Any], output: Path, errors: Path) -> int:
    """Does not return, but where the command does not end as it should."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, output), (2, errors if spec.get("apart") else output)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(spec.get("cwd", ROOT))
    os.environ.update(spec["env"])
    if "code" in spec:
        for name in [name for name in sys.modules if name.split(".")[0] == "megasparse"]:
            del sys.modules[name]
        sys.path.insert(0, spec["code"])
    from megasparse import cli

    try:
        cli.main(spec["arguments"])
    except Exception:
        traceback.print_exc()
    return 99  # no code of ours


def _serve() -> None:
    import torch

    import megasparse.hf.from_hf
    import megasparse.hf.verify
    import megasparse.preflight
    import megasparse.training.loop  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            specs, places = json.loads(line), Path(folder)
            files = [(places / f"{index}.output", places / f"{index}.errors") for index in range(len(specs))]
            pids = [fork(partial(_command, spec, *pair)) for spec, pair in zip(specs, files, strict=True)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            texts = [[path.read_text(errors="replace") if path.exists() else "" for path in pair] for pair in files]
        print(json.dumps([[code, *pair] for code, pair in zip(codes, texts, strict=True)]), flush=True)


if __name__ == "__main__":
    _serve()
