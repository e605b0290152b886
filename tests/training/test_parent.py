"""A killed rank leaves no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from tests.training.cases import configuration

ROOT = Path(__file__).resolve().parents[2]


def command(process: psutil.Process) -> str:
    """Its command line; of one that has ended, nothing."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_killed_run_leaves_no_helper_of_its_checkpoints(tmp_path: Path, data_folder: Path) -> None:
    run = tmp_path / "run"
    content = configuration(run, str(data_folder / "a"), checkpoint={"interval": 50})
    content["training"]["steps"] = 1_000_000
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "megasparse", "pretrain", str(tmp_path / "tiny.yaml")],
            stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 200
        while not (run / "checkpoints" / "latest").exists():
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        helpers = psutil.Process(process.pid).children(recursive=True)
        reporters = [helper for helper in helpers if "spawn_main" in command(helper)]
        assert reporters
        for helper in reporters:
            assert not [region.path for region in helper.memory_maps() if "torch" in region.path], "seconds, and 250 MB"
    finally:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(helpers, timeout=20)
    for helper in left:
        helper.kill()
    assert left == []
