"""Runs that may be killed: each in forked processes of a helper which has imported everything already.

`Helper` starts the helper process; `Helper.run` forks one process a rank for one training run and returns what became
of them. SIGKILL and other signals hit real training processes, and a start costs no imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from tests.launch import fork, free_port

ROOT = Path(__file__).resolve().parent.parent.parent


class Helper:
    """Talks to one helper process over its standard input and output, one JSON line each way."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.training.forked"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, configuration: dict[str, Any], world: int = 1, **actions: Any) -> dict[str, Any]:
        """One run on `world` ranks.

        Args:
            configuration: nested dict.
            world: ranks.
            actions: what happens to it, see `_act`.

        Returns:
            `records`: one a rank (see `Recorder.record`), None where the rank was killed; `exit`: exit codes, minus the
            signal where one ended it; `output`: everything the ranks printed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([configuration, world, actions]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the helper process ended"
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _act(actions: dict[str, Any], rank: int, recorder: Any, configuration: dict[str, Any]) -> Any:
    """Wraps the recorder's `on_step_end`, or starts a thread, to do one of:

    kill_after: SIGKILL this process after that step. kill_in_save_of: SIGKILL it while the checkpoint of that step is
    being written, `kill_delay` seconds after its files appear. signal_at: {"step", "rank", "number"}, sent to the
    rank's process, or with "group" to all its child processes too. stop_file_at: makes the stop file after that step.
    no_files_beyond: {"step", "bytes"}, after that step, as on a full disk.
    bad_gradient_at: a gradient is not a number in that step. bad_input_at: what enters an MLP is not. broken_from: a
    weight is infinite from that step on.
    """
    from megasparse.training.callbacks import Callback

    class Actor(Callback):
        def on_step_start(self, state: Any) -> None:
            weight = next(state.model[0].parameters())
            if state.step + 1 == actions.get("bad_gradient_at"):
                self.hook = weight.register_hook(lambda gradient: gradient * float("nan"))
            elif hasattr(self, "hook"):
                self.hook.remove()
            if state.step + 1 == actions.get("bad_input_at"):
                self.hook = state.mlps[0].register_forward_pre_hook(lambda mlp, x: (x[0] * float("nan"), *x[1:]))
            if state.step + 1 == actions.get("broken_from"):
                weight.data.fill_(float("inf"))

        def on_step_end(self, state: Any, metrics: Any) -> None:
            if state.step == actions.get("kill_after"):
                os.kill(os.getpid(), signal.SIGKILL)
            full = actions.get("no_files_beyond")
            if full and state.step == full["step"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (full["bytes"], resource.RLIM_INFINITY))
            at = actions.get("signal_at")
            if at and state.step == at["step"] and rank == at["rank"]:
                (os.killpg if at.get("group") else os.kill)(os.getpid(), at["number"])
            if state.step == actions.get("stop_file_at") and rank == 0:
                (state.run_directory / "stop").touch()

    if "kill_in_save_of" in actions:
        root = Path(configuration["run"]["directory"]) / "checkpoints"
        pattern = f".step_{actions['kill_in_save_of']:08d}.partial-*"

        def watch() -> None:
            while not list(root.glob(pattern)):
                time.sleep(0.001)
            time.sleep(actions.get("kill_delay", 0.0))
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
    return Actor()


def _rank(configuration: dict[str, Any], world: int, actions: dict[str, Any], rank: int, port: int, out: Path) -> int:
    from megasparse.config import parse_config
    from megasparse.training.loop import pretrain
    from tests.training.cases import DeadNeurons, Recorder

    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in a shell's background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where they run under nohup
    output = os.open(out / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if world > 1:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    recorder = Recorder()
    observers = [recorder, _act(actions, rank, recorder, configuration)]
    cfg = parse_config(configuration)
    if cfg.sparsity.reinit.every:
        observers.insert(0, DeadNeurons())
    if actions.get("monitor"):
        from megasparse.monitoring.monitor import Monitor

        observers.insert(0, Monitor())
    code = pretrain(cfg, observers)
    (out / f"{rank}.json").write_text(json.dumps(recorder.record(code)))
    return code


def _serve() -> None:
    import torch

    import megasparse.training.loop  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        world = request[1]
        with tempfile.TemporaryDirectory() as folder:
            out, port = Path(folder), free_port()
            pids = [fork(partial(_rank, *request, rank=rank, port=port, out=out)) for rank in range(world)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            for pid in pids:  # what a killed rank leaves behind (the checkpoint writer's helper) is in its group
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            files = [out / f"{rank}.json" for rank in range(world)]
            records = [json.loads(file.read_text()) if file.exists() else None for file in files]
            logs = "".join(f"--- rank {r}\n{(out / f'{r}.log').read_text(errors='replace')}" for r in range(world))
        print(json.dumps({"records": records, "exit": codes, "output": logs}), flush=True)


if __name__ == "__main__":
    _serve()
