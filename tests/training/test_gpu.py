"""Whole training runs on GPUs: the sparse kernels train as the dense path does, to within bf16 rounding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.gpu import NEEDS_HOPPER
from tests.launch import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
HIDDEN, WIDTH, STEPS = 512, 1408, 50
PIPELINE = ["parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.pipeline=2"]

pytestmark = NEEDS_HOPPER


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a data set of real text, its tokenizer beside it."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    library = Path(sysconfig.get_path("stdlib"))
    files = [str(file) for file in sorted(library.glob("[a-f]*.py"))]
    command = [sys.executable, "-m", "megasparse", "preprocess", *files, "--output", str(prefix)]
    subprocess.run([*command, "--train-tokenizer", "1024", "--workers", "4"], cwd=ROOT, check=True)
    return prefix


def start(
    text: Path,
    directory: Path,
    tensor: int,
    path: str,
    micro_batch: int,
    overrides: Sequence[str] = (),
    module: str = "megasparse",
) -> subprocess.Popen[bytes]:
    """Begin a run of 50 steps of a small GPT in bf16 on `tensor` GPUs, by `module`'s command line.

    At learning rates that make the loss spike, two dense runs drift apart at random by tenths; at this one they do not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "config-in.yaml"
    config.write_text(
        json.dumps(
            {
                "run": {"name": directory.name, "directory": str(directory)},
                "model": {
                    "num_layers": 4,
                    "hidden_size": HIDDEN,
                    "ffn_hidden_size": WIDTH,
                    "num_attention_heads": 8,
                    "vocab_size": 1024,
                },
                "sparsity": {"path": path, "l1": {"mode": "constant", "coeff": 1e-4}},
                "parallel": {"tensor": tensor, "sequence_parallel": tensor > 1},
                "data": {
                    "blend": str(text),
                    "split": "1,0,0",
                    "tokenizer": f"{text}-tokenizer",
                    "sequence_length": 512,
                },
                "training": {
                    "micro_batch_size": micro_batch,
                    "global_batch_size": 8,
                    "steps": STEPS,
                    "eval_steps": 0,
                },
                "optimizer": {"lr": 2e-4, "schedule": {"kind": "constant", "warmup_steps": 10}},
                "checkpoint": {"interval": 0},
                "logging": {"interval": 1, "report": False},
            }
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={tensor}"]
    command += [f"--master-port={free_port()}", "-m", module, "pretrain", str(config), *overrides]
    with (directory / "console.log").open("w") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)


def losses(process: subprocess.Popen[bytes], directory: Path, first: int = 1) -> torch.Tensor:
    """fp64 [STEPS - first + 1], when the run is over."""
    code = process.wait(timeout=300)
    assert code == 0, (directory / "console.log").read_text()[-4000:]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    values = {row["step"]: row["loss/lm"] for row in rows if row["split"] == "train"}
    return torch.tensor([values[step] for step in range(first, STEPS + 1)], dtype=torch.float64)


def check_rounding_alone(reference: torch.Tensor, halves: torch.Tensor, other: torch.Tensor) -> None:
    """Losses of `other` are as near to the reference as those of `halves`, which differs from it in rounding alone: its
    micro-batches are half as large."""
    noise, gap = (halves - reference).abs(), (other - reference).abs()
    print(f"mean {gap.mean():.2e}, max {gap.max():.2e}; rounding: mean {noise.mean():.2e}, max {noise.max():.2e}")
    assert reference[-1] < reference[0] - 1.0
    assert gap[:5].max() < 5e-3
    assert gap.mean() <= 2 * noise.mean() + 5e-4
    # Not the largest of all: single batches magnify what rounding has done to the weights by up to ten.
    assert gap.quantile(0.9) <= 2 * noise.quantile(0.9) + 1e-3


@pytest.mark.parametrize("tensor", [1, 2])
def test_sparse_kernels_train_as_the_dense_path(tensor: int, text: Path, tmp_path: Path) -> None:
    """The gap must be that of two dense runs which differ in rounding alone (size of the micro-batches)."""
    if torch.cuda.device_count() < tensor:
        pytest.skip(f"needs {tensor} GPUs")
    runs = {"dense": ("dense", 8), "dense-halves": ("dense", 4), "sparse": ("sparse", 8)}
    processes = {name: start(text, tmp_path / name, tensor, *how) for name, how in runs.items()}
    check_rounding_alone(*(losses(process, tmp_path / name) for name, process in processes.items()))


def test_two_gpus_train_as_one(text: Path, tmp_path: Path) -> None:
    """Tensor and sequence parallelism, sparse, to within what rounding alone does (size of the micro-batches)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    runs = {"one": (1, 8), "one-halves": (1, 4), "two": (2, 8)}
    processes = {
        name: start(text, tmp_path / name, tensor, "sparse", micro_batch)
        for name, (tensor, micro_batch) in runs.items()
    }
    check_rounding_alone(*(losses(process, tmp_path / name) for name, process in processes.items()))


@pytest.mark.parametrize(
    ("gpus", "overrides"),
    [
        (1, []),
        (1, ["model.implementation=local"]),
        (1, ["training.fp8=hybrid", "training.fp8_recipe=tensorwise"]),
        (2, []),
        (2, ["training.fp8=hybrid", "training.fp8_recipe=blockwise"]),
        (2, PIPELINE),
        (2, [*PIPELINE, "parallel.virtual_pipeline=2"]),
        (2, ["parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.context=2"]),
        (2, ["parallel.tensor=1", "parallel.sequence_parallel=false"]),
    ],
    ids=["one", "local", "tensorwise", "tensor", "blockwise", "pipeline", "interleaved", "context", "data"],
)
def test_cuda_graphs_change_nothing(gpus: int, overrides: list[str], text: Path, tmp_path: Path) -> None:
    """The same kernels in the same order: the same losses, bit for bit, over several micro-batches a step."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    overrides = [*overrides, "training.deterministic=true"]
    processes = {
        name: start(text, tmp_path / name, gpus, "sparse", 2, [*overrides, f"training.cuda_graphs={name}"])
        for name in ("false", "true")
    }
    eager, graphs = (losses(process, tmp_path / name) for name, process in processes.items())
    print(f"largest gap {(eager - graphs).abs().max():.2e}")
    assert eager[-1] < eager[0] - 1.0
    assert torch.equal(eager, graphs)


def test_no_host_waits_for_its_gpu_before_the_update(text: Path, tmp_path: Path) -> None:
    """A host that waits in the middle of a step launches the update, and the next step's begin, to an idle GPU."""
    process = start(text, tmp_path / "run", 1, "sparse", 4, module="tests.training.no_wait")
    assert len(losses(process, tmp_path / "run")) == STEPS


def test_a_deterministic_sparse_run_resumes_bitwise(text: Path, tmp_path: Path) -> None:
    """From a checkpoint behind several decisions of the routers: capacities and neuron orders."""
    overrides = ["training.deterministic=true", "sparsity.route_interval=5", "checkpoint.interval=25"]
    straight = losses(start(text, tmp_path / "straight", 1, "sparse", 8, overrides), tmp_path / "straight")
    checkpoint = Path("checkpoints", "step_00000025")
    shutil.copytree(tmp_path / "straight" / checkpoint, tmp_path / "resumed" / checkpoint)
    resumed = losses(start(text, tmp_path / "resumed", 1, "sparse", 8, overrides), tmp_path / "resumed", first=26)
    assert torch.equal(resumed, straight[25:])
    rows = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert any(value == "sparse" for row in rows for key, value in row.items() if key.endswith("/path"))
