"""Peak memory of the conversions, for layers and an embedding of the shape of a 7B model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LAYER = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
"""Bytes of one layer in bf16."""

SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
from megasparse.hf import from_hf, to_hf

def resident(field="RssAnon"):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])

peak, mapped, running = 0, 0, True

def watch():
    global peak, mapped
    while running:
        peak = max(peak, resident())
        mapped = max(mapped, resident("RssFile"))
        time.sleep(0.002)

def measure(action):
    global peak, mapped, running
    before, files, peak, mapped, running = resident(), resident("RssFile"), 0, 0, True
    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    running = False
    watcher.join()
    return peak - before, mapped - files

torch.set_num_threads(1)
folder, direction = Path(sys.argv[1]), sys.argv[2]
if direction == "out":
    options = to_hf.ToHf(folder / "checkpoint", folder / "hf", shard_bytes=500_000_000)
    print(*measure(lambda: to_hf.convert_to_hf(options)))
else:
    options = from_hf.FromHf(folder / "hf", folder / "back")
    print(*measure(lambda: from_hf.convert_from_hf(options)))
"""

WRITE = """
import sys
from pathlib import Path
import torch
from tests.hf.cases import write_plain

raw = {
    "model": {
        "num_layers": 2, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "training": {"global_batch_size": 1, "steps": 1},
}
make = lambda weight: torch.zeros(weight.shape, dtype=torch.bfloat16)
write_plain(Path(sys.argv[1]) / "checkpoint", raw, make=make, dtype=torch.bfloat16)
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peak_memory_is_that_of_a_layer_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(WRITE, str(tmp_path))
    out, _ = map(int, run(SCRIPT, str(tmp_path), "out").split())
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    back, mapped = map(int, run(SCRIPT, str(tmp_path), "in").split())
    with capsys.disabled():
        print(f"\nlayer {LAYER / 1e6:.0f} MB; own memory: export {out / 1e6:.0f} MB, import {back / 1e6:.0f} MB, "
              f"mapped while importing {mapped / 1e6:.0f} MB")  # fmt: skip
    # The largest weight is the embedding (262 MB), of which there are two copies at a time: read, and to be written.
    assert out < LAYER + 250e6
    assert back < LAYER + 250e6
    assert mapped < 2 * 500e6
