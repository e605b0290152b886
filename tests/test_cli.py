"""The command as users run it: start-up time, exit codes, messages without tracebacks, the dry run, doctor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megasparse import cli
from megasparse.config import load_config
from tests.test_config import CONFIGS, SMALL, write


def run(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-m", "megasparse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=120)


def main(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_help_is_quick() -> None:
    """Under half a second: no heavy module is imported (CPU time, as other work on the machine is not ours)."""
    code = (
        "import resource, sys\n"
        "from megasparse.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n"
        "    usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print(usage.ru_utime + usage.ru_stime, *sorted(sys.modules))\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 5
    seconds, *modules = done.stdout.splitlines()[-1].split()
    assert float(seconds) < 0.5
    assert not {"torch", "megatron", "pydantic", "transformers", "rich", "numpy"} & set(modules)
    for command in ("preprocess", "pretrain", "evaluate", "report", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_passes_the_dry_run(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main("pretrain", path, "--dry-run") == 1, "data is not named"
    output = capsys.readouterr().out
    cfg = load_config(path)
    assert f"num_layers: {cfg.model.num_layers}  # " in output
    assert "weight_decay: 0.1  # " in output
    assert "tokens a step" in output
    resolved = output.split("\nlayers and batches")[0].split("\n", 1)[1]
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert load_config(tmp_path / "resolved.yaml") == cfg, "the printed configuration is the configuration"


def test_dry_run_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "small.yaml", {**SMALL, "sparsity": {"l1": {"mode": "target", "target_l0": 20}}})
    assert (
        main("pretrain", path, "training.steps=7", "--dry-run", "--world-size", "4", "--l0", "5", "parallel.tensor=2")
        == 1
    )
    output = capsys.readouterr().out
    assert "steps: 7  # override training.steps=7" in output
    assert f"target_l0: 20.0  # {path}:" in output
    assert "tensor: 2  # override parallel.tensor=2" in output
    assert "2 x 1 x 1 x 2" in output
    assert "all sparse at L0 5" in output
    assert "Before this can run" in output
    assert main("pretrain", path, "--dry-run", "--world-size", "3") == 2
    assert "training.global_batch_size = 8" in capsys.readouterr().err
    assert main("pretrain", path, "--world-size", "4") == 2
    assert "--world-size: is of --dry-run alone" in capsys.readouterr().err, "else a run would start"
    assert main("pretrain", path, "--dry-run", "--l0=-4") == 2
    assert "argument --l0: '-4' is not a positive number" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs")), "a dry run writes nothing"


def test_mistakes_end_without_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "small.yaml", {**SMALL, "optimzer": {"lr": 1}})
    done = run("pretrain", path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{path}:" in done.stderr
    assert "optimzer: unknown key" in done.stderr
    assert "did you mean optimizer?" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["small.yaml"], "nothing is left behind"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "--master-port=0"]
    job = subprocess.run(
        [*command, "-m", "megasparse", "pretrain", str(path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert job.stderr.count("optimzer: unknown key") == 1, "one rank tells what all ranks know, before torchrun ends it"
    path = write(tmp_path / "small.yaml", SMALL)
    done = run("pretrain", path, "data.blend=absent", cwd=tmp_path, RANK="3")
    assert done.returncode == 2
    assert "(rank 3 on " in done.stderr
    assert "absent.bin" in done.stderr, "files may be missing on one host only"
    assert os.listdir(tmp_path) == ["small.yaml"]


def test_wrong_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["pretrian"], [], ["pretrain"], ["pretrain", "a.yaml", "--dryrun"], ["doctor", "extra"]):
        assert main(*arguments) == 2
    assert main("pretrain", tmp_path / "none.yaml") == 2
    assert "none.yaml': cannot be read" in capsys.readouterr().err
    assert main("pretrain", "a.yaml", "--training.steps", "5") == 2
    assert "keys of the configuration take no dashes: training.steps=VALUE" in capsys.readouterr().err
    preprocessing = ("preprocess", "in.txt", "--output", tmp_path / "d", "--train-tokenizer", "300")
    for option, value in (("--workers", "0"), ("--workers", "-3"), ("--workers", "2.5")):
        assert main(*preprocessing, option, value) == 2
        assert f"argument {option}: '{value}' is not a number of 1 or more" in capsys.readouterr().err
    for value in ("0", "-1", "nan"):
        assert main(*preprocessing, "--train-megabytes", value) == 2
        assert f"argument --train-megabytes: '{value}' is not a positive number" in capsys.readouterr().err
    for command in ("preprocess", "evaluate", "report"):
        assert main(command, "--help") == 0


def test_preprocess_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text to tokenise\n" * 50)
    done = run("preprocess", "in.txt", "--output", "d/text", "--train-tokenizer", "280", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "d/text.bin, .idx: 1 documents" in done.stdout
    assert "data.blend: d/text, data.tokenizer: d/text-tokenizer" in done.stdout
    assert done.stderr == "", "no progress bar where nobody looks, no warnings"
    again = run("preprocess", "in.txt", "--output", "d/text", "--tokenizer", "d/text-tokenizer", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("megasparse: d/text.bin")
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_tokenizer_of_too_little_text_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("some text to tokenise\n" * 50)
    for size, told in ((260, False), (5000, True)):
        arguments = ("--output", f"{size}", "--train-tokenizer", f"{size}", "--workers", "1")
        assert main("preprocess", "in.txt", *arguments) == 0
        line = rf"^{size}-tokenizer: \d+ tokens, fewer than the 5,000 asked for: there is too little text$"
        assert bool(re.search(line, capsys.readouterr().out, re.MULTILINE)) == told


def test_the_exit_code_of_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 for all that would keep the run from starting here, or from fitting; the plan is printed all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("some text to tokenise\n" * 50)
    assert main("preprocess", "in.txt", "--output", "d/text", "--train-tokenizer", "280", "--workers", "1") == 0
    config = {**SMALL, "data": {"blend": "d/text", "tokenizer": "d/text-tokenizer"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "a file").touch()
    (tmp_path / "old" / "checkpoints" / "step_00000004").mkdir(parents=True)
    Tokenizer(WordLevel({"w": 0}, unk_token="w")).save(str(tmp_path / "tokenizer.json"))
    for code, reason, *arguments in (
        (0, "", "--gpu-memory", "80"),
        (1, "no file absent.bin", "data.blend=absent"),
        (1, "a file is not a directory", "run.directory=a file/runs"),
        (1, "no token '<|endoftext|>'", "data.tokenizer=tokenizer.json", "model.vocab_size=512"),
        (1, "must, but there is no checkpoint in", "checkpoint.resume=must"),
        (1, "never, but old/checkpoints holds checkpoints", "run.directory=old", "checkpoint.resume=never"),
        (0, "", "run.directory=old", "checkpoint.resume=must"),
        (1, "checkpoint.load = 'd': there is no checkpoint there", "checkpoint.load=d"),
        (0, "", "checkpoint.load=old"),
        (0, "", "run.directory=old", "checkpoint.load=removed since"),
        (1, "Too much for 0.001 GiB", "--gpu-memory", "0.001"),
        (2, "training.global_batch_size = 8", "--world-size", "3"),
    ):
        capsys.readouterr()
        assert (code, *arguments) == (main("pretrain", "c.yaml", "--dry-run", *arguments), *arguments)
        output, errors = capsys.readouterr()
        assert ("in all" in output) == (code != 2)
        assert ("Before this can run" in output) == (code == 1 and not reason.startswith("Too much"))
        assert reason in output + errors
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", "d", "c.yaml", "a file", "old", "tokenizer.json"}


def test_evaluate_and_report_need_a_run(tmp_path: Path) -> None:
    for command in ("evaluate", "report"):
        done = run(command, tmp_path / "none", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "none" in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_doctor(tmp_path: Path) -> None:
    done = run(
        "doctor", "--json", cwd=tmp_path, CUDA_VISIBLE_DEVICES="", HOME=str(tmp_path), NETRC=str(tmp_path / "no")
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == int(any(check["status"] == "fail" for check in checks.values()))
    assert {
        "Python",
        "PyTorch",
        "Megatron-Core",
        "GPUs",
        "Transformer Engine",
        "Apex",
        "nvcc",
        "sparse kernels",
    } <= set(checks)
    assert checks["PyTorch"]["status"] == checks["Megatron-Core"]["status"] == "ok"
    assert checks["W&B"]["status"] == "warn" or "WANDB_API_KEY" in os.environ
    assert all(check["cost"] or check["fix"] for check in checks.values() if check["status"] != "ok")
    assert not list(tmp_path.iterdir()), "it changes nothing"


def test_doctor_finds_the_login_to_ones_own_wandb_server(tmp_path: Path) -> None:
    """As `wandb login --host` leaves it."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine wandb.example.org\n  login user\n  password {40 * '0'}\n")
    script = "from megasparse.doctor import _wandb; print(*_wandb())"
    places = {"WANDB_CONFIG_DIR": str(tmp_path / "config"), "NETRC": str(netrc)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | places
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "status='ok'" in done.stdout
    assert "logged in to https://wandb.example.org" in done.stdout
    assert done.stderr == ""


def test_doctor_without_nvcc_or_with_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shut"
    folder.mkdir()
    done = run("doctor", "--json", cwd=folder, CUDA_HOME=str(tmp_path), CXX="no-such-compiler")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["nvcc"]["found"] == "not found"
    assert checks["C++ compiler"]["status"] == "warn"
    assert "CXX" in checks["C++ compiler"]["fix"]
    table = run("doctor", cwd=folder, CUDA_VISIBLE_DEVICES="")
    assert "what it costs" in table.stdout
    assert "failed," in table.stdout
