"""Real multi-process runs for tests: `run_distributed(2, "tests.megatron.cases:function", arguments)`.

Worker processes import torch and Megatron once and are used again by later calls; each call gives them a process
group (gloo) of its own. A failure or a timeout ends the workers concerned and raises with what they wrote.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import random
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_pool: list[_Worker] = []


def free_port() -> int:
    """A TCP port that nothing listens on now, below those that the system itself may give to anybody at any moment."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports between 20000 and 32000 are all in use")


def fork(body: Callable[[], int]) -> int:
    """A new process that calls `body` and ends with what it returns, or as Python would; its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        atexit._clear()  # exit handlers of the helper are not this process's
        try:
            code = body()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # not of logs
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # What Python does at an exit, by hand: this is not the interpreter's own.
            import multiprocessing.util

            atexit._run_exitfuncs()
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
            os._exit(code)
    return pid


class _Worker:
    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="megasparse-worker-")
        self.log = Path(self.directory.name) / "output"
        address = str(Path(self.directory.name) / "socket")
        key = secrets.token_bytes(16)
        listener = Listener(address, "AF_UNIX", authkey=key)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
            "MEGASPARSE_TEST_KEY": key.hex(),
        }
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.launch", address],
                cwd=_ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.connection: Connection = listener.accept()
        listener.close()

    def output(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()
        self.process.kill()
        self.process.wait()
        self.directory.cleanup()


def run_distributed(
    world_size: int, target: str, *args: Any, timeout: float = 180.0, env: dict[str, str] | None = None
) -> list[Any]:
    """Call `target` ("module:function") with `args` on `world_size` ranks; return what it returned, by rank.

    The gloo process group is initialised around the call; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and
    `env` are set. Arguments and results are pickled. Raises AssertionError with the ranks' output where one fails or
    `timeout` seconds pass.
    """
    while len(_pool) < world_size:
        _pool.append(_Worker())
    workers = _pool[:world_size]
    port = free_port()
    for rank, worker in enumerate(workers):
        worker.connection.send((rank, world_size, port, target, args, env or {}, timeout))
    results: list[Any] = [None] * world_size
    problems: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    waiting = set(range(world_size))
    while waiting and not problems:
        for rank in sorted(waiting):
            try:
                if not workers[rank].connection.poll(0.02):
                    continue
                fine, value = workers[rank].connection.recv()
            except (EOFError, OSError):
                fine, value = False, f"ended with exit code {workers[rank].process.wait()}"
            waiting.discard(rank)
            if fine:
                results[rank] = value
            else:
                problems[rank] = value
        if waiting and time.monotonic() > deadline:
            problems = dict.fromkeys(waiting, f"no answer within {timeout} s")
    if problems:
        time.sleep(0.5)  # let the others say what they saw
        report = [f"{target} on {world_size} ranks failed"]
        for rank, worker in enumerate(workers):
            report.append(f"--- rank {rank}: {problems.get(rank, 'waiting' if rank in waiting else 'done')}")
            report.append(worker.output())
        stop_workers()
        raise AssertionError("\n".join(report))
    return results


def stop_workers() -> None:
    """End all worker processes; the next call starts new ones."""
    while _pool:
        _pool.pop().stop()


atexit.register(stop_workers)


def _call(rank: int, world_size: int, port: int, target: str, args: Any, env: dict[str, str], timeout: float) -> Any:
    import torch

    place = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env,
    }  # fmt: skip
    os.environ.update(place)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        module, function = target.split(":")
        return getattr(importlib.import_module(module), function)(*args)
    finally:
        _forget()
        for name in place:
            os.environ.pop(name, None)


def _forget() -> None:
    """Leave no state of this call behind."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()  # rings of objects keep groups, whose threads poll for ever


def _serve(address: str) -> None:
    connection = Client(address, "AF_UNIX", authkey=bytes.fromhex(os.environ["MEGASPARSE_TEST_KEY"]))
    import torch

    import megasparse.megatron  # noqa: F401

    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, _call(*task))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


if __name__ == "__main__":
    _serve(sys.argv[1])
