"""`tools/benchmark_inference.py --quick` runs to its end; what needs a GPU is skipped with a reason."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_inference import arguments

ROOT = Path(__file__).parents[2]


def test_quick_run_reports_what_fired(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    wanted = {}
    for number, probability in ((0, 0.05), (3, 0.2)):
        pattern = generator.random((256, 256)) < probability * generator.random(256)
        np.savez_compressed(tmp_path / f"layer{number}.npz", a=np.packbits(pattern, axis=1))
        wanted[number / 3] = pattern.sum(1).mean()
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "benchmark_inference.py"), "--quick"]
    done = subprocess.run(
        [*command, "--patterns", str(tmp_path), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [layer["depth"] for layer in record["layers"]] == [0, 1]
    for layer in record["layers"]:
        assert layer["l0"] == pytest.approx(wanted[layer["depth"]], rel=0.05)
    results = record["results"]
    assert set(results["forward"]) == {"dense", "sparse", "dense compiled", "sparse compiled"}
    assert results["errors"]["sparse"] <= 1.2 * results["errors"]["dense"] + 1e-6
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
    if not torch.cuda.is_available():
        assert "decode 1: skipped, needs CUDA graphs" in done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--text", "a.txt"], "--text needs --model"),
        (["--model", "exported", "--patterns", "recorded"], "--patterns and --routes are of the random model"),
        (["--model", "exported", "--routes"], "--patterns and --routes are of the random model"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    options: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_inference.py", *options])
    with pytest.raises(SystemExit):
        arguments()
    assert expected in capsys.readouterr().err
