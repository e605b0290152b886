"""`megasparse doctor`: what this machine has, and what each missing thing costs.

A check is "ok"; "warn": training works, with a loss that `cost` names; or "fail": training cannot work, or not as
the machine promises. Nothing is built, downloaded or changed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

from megasparse.host import installed_version

Status = Literal["ok", "warn", "fail"]
MEGATRON_VERSIONS = ((0, 16, 1), (0, 20))
"""First that works, first that is not known to."""
SHARED_MEMORY_PER_GPU = 1 << 30
SLOW_SHARE = 0.5
"""Of the data sheet's bf16 peak, below which a GPU counts as slow: a healthy one gives 0.7 to 0.8."""


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    found: str
    cost: str = ""
    """What its absence costs."""
    fix: str = ""


def examine() -> list[Check]:
    """Run every check. A check that itself breaks is a failure of that check, not of the others."""
    results: list[Check] = []
    for check in _CHECKS:
        try:
            results += check()
        except Exception as error:
            name = check.__name__.removeprefix("_").replace("_", " ")
            results.append(Check(name, "fail", f"{type(error).__name__}: {error}", "unknown"))
    return results


def print_checks(checks: list[Check], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    table = Table("", "check", Column("found", overflow="fold"), "what it costs, what to do", show_lines=False)
    signs = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]FAIL[/red]"}
    for check in checks:
        advice = ". ".join(text for text in (check.cost, check.fix) if text)
        table.add_row(signs[check.status], check.name, escape(check.found), escape(advice))
    console.print(table)
    failed = sum(check.status == "fail" for check in checks)
    warned = sum(check.status == "warn" for check in checks)
    console.print(f"{failed} failed, {warned} warnings, {len(checks) - failed - warned} in order")


def _numbers(version: str) -> tuple[int, ...]:
    head = version.split("+")[0].split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in head[:3])


def _python() -> Iterator[Check]:
    yield Check("Python", "ok", sys.version.split()[0])


def _torch() -> Iterator[Check]:
    version = installed_version("torch")
    if version is None:
        yield Check("PyTorch", "fail", "not installed", "nothing works", "install megasparse with its dependencies")
        return
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPU"
    yield Check("PyTorch", "ok", f"{torch.__version__} {build}")


def _megatron_core() -> Iterator[Check]:
    version = installed_version("megatron-core")
    if version is None:
        yield Check("Megatron-Core", "fail", "not installed", "no training", "pip install megatron-core")
        return
    first, end = MEGATRON_VERSIONS
    known = first <= _numbers(version) < end
    wanted = f"{'.'.join(map(str, first))} up to, not including, {'.'.join(map(str, end))}"
    yield Check("Megatron-Core", "ok" if known else "fail", version, "" if known else f"tested with {wanted}")


def _driver_gpus() -> list[str]:
    """GPUs as the driver lists them, whatever torch sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _gpus() -> Iterator[Check]:
    import torch

    listed = _driver_gpus()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable and listed:
        reason = str(caught[0].message).split(".")[0] if caught else "no reason given"
        if torch.version.cuda is None:
            reason = "this PyTorch is built for CPU"
        yield Check("GPUs", "fail", f"the driver lists {len(listed)} ({listed[0]}), PyTorch can use none: {reason}",
                    "training would run on the CPU", "install a PyTorch built for this driver's CUDA")  # fmt: skip
        return
    if not usable:
        yield Check("GPUs", "warn", "none", "training runs on the CPU: small models only")
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    if nccl:
        yield Check("NCCL", "ok", nccl)
    else:
        yield Check("NCCL", "fail", "not in this PyTorch", "one GPU only", "install PyTorch from its CUDA builds")


def _gpu(index: int) -> Check:
    import torch

    from megasparse.monitoring.throughput import peak_bf16_flops

    properties = torch.cuda.get_device_properties(index)
    name = f"GPU {index}"
    capability = f"{properties.major}.{properties.minor}"
    found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}"
    if (properties.major, properties.minor) < (8, 0):
        return Check(name, "fail", found, "no bf16 tensor cores: unusably slow", "use an Ampere or newer GPU")
    rate, peak = product_rate(index), peak_bf16_flops(properties.name)
    found += f", {rate / 1e12:.0f} TFLOP/s in a bf16 product"
    if peak is not None and rate < SLOW_SHARE * peak:
        return Check(name, "warn", found, f"{rate / peak:.0%} of its peak: the whole job waits for its slowest GPU",
                     "look for other processes, power caps and heat (nvidia-smi -q -d PERFORMANCE)")  # fmt: skip
    if (properties.major, properties.minor) != (9, 0):
        return Check(name, "warn", found, "the sparse kernels are for capability 9.0 (Hopper): layers run dense")
    return Check(name, "ok", found)


def product_rate(index: int, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a bf16 matrix product."""
    import torch

    with torch.cuda.device(index):
        a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            a @ a
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            a @ a
        torch.cuda.synchronize()
        return 2.0 * size**3 * repeats / (time.perf_counter() - start)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _transformer_engine() -> Iterator[Check]:
    version = installed_version("transformer-engine") or installed_version("transformer-engine-torch")
    if version is None:
        cost = "attention, norms and projections use PyTorch's operators (somewhat slower on GPUs)"
        yield Check("Transformer Engine", "warn" if _has_cuda() else "ok", "not installed", cost)
        return
    if not _has_cuda():
        yield Check("Transformer Engine", "ok", version, "not used without a GPU")
        return
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # an ABI mismatch raises ImportError, OSError, RuntimeError, ...
        yield Check("Transformer Engine", "fail", f"{version} cannot be imported: {str(error)[:200]}",
                    "Megatron-Core imports it and fails too",
                    "install the version for this PyTorch, or uninstall it")  # fmt: skip
        return
    from megasparse.config import Fp8Recipe
    from megasparse.megatron.fp8 import missing

    usable = [recipe for recipe in get_args(Fp8Recipe) if missing(recipe) is None]
    yield Check("Transformer Engine", "ok", f"{version}; training.fp8_recipe: {', '.join(usable) or 'none'}")


def _apex() -> Iterator[Check]:
    if importlib.util.find_spec("apex") is not None:
        yield Check("Apex", "ok", installed_version("apex") or "installed")
    elif importlib.util.find_spec("transformer_engine") is not None:
        yield Check("Apex", "ok", "not installed", "not needed beside Transformer Engine")
    else:
        cost = "Megatron-Core uses PyTorch's Adam and gradient norms (a little slower per step)"
        yield Check("Apex", "warn" if _has_cuda() else "ok", "not installed", cost)


def _compilers() -> Iterator[Check]:
    from megasparse.mlp.build import BuildError, find_nvcc

    needed: Status = "warn" if _has_cuda() else "ok"
    cost = "the sparse kernels cannot be built here" + ("" if _has_cuda() else "; not needed without a GPU")
    try:
        nvcc = find_nvcc()
    except BuildError:
        fix = "install the CUDA toolkit 12.8 or newer, or set CUDA_HOME"
        yield Check("nvcc", needed, "not found", cost, fix if _has_cuda() else "")
    else:
        done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
        release = next((line for line in done.stdout.splitlines() if "release" in line), done.stdout.strip())
        yield Check("nvcc", "ok", f"{nvcc}: {release.strip()}")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler):
        yield Check("C++ compiler", "ok", str(shutil.which(compiler)))
    else:
        cost = "the sparse kernels and Megatron's data-index helpers cannot be built"
        yield Check("C++ compiler", "warn", f"{compiler} not found", cost, "install g++ or set CXX")


def _kernels() -> Iterator[Check]:
    from megasparse.mlp import build

    name = "sparse kernels"
    shipped = Path(build.__file__).resolve().parent / build.LIBRARY
    if shipped.is_file():
        yield Check(name, "ok", f"shipped: {shipped}")
        return
    try:
        library = build.cache_entry()
    except (build.BuildError, OSError, subprocess.SubprocessError) as error:
        if _has_cuda():
            yield Check(name, "warn", f"not built: {error}", "layers run dense: correct, no faster, no lighter")
        else:
            yield Check(name, "ok", "not built", "not needed without a GPU: the CPU runs the PyTorch implementation")
        return
    if library.is_file():
        yield Check(name, "ok", f"built: {library}")
    else:
        fix = "python -m megasparse.mlp.build, once a cluster, saves the wait"
        yield Check(name, "warn" if _has_cuda() else "ok", "not built yet", "built at first use: a minute or two", fix)


def _wandb() -> Iterator[Check]:
    version = installed_version("wandb")
    if version is None:
        yield Check("W&B", "warn", "not installed", "only logging.wandb.mode: disabled works", "pip install wandb")
        return
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    with redirect_stderr(StringIO()):  # it says which settings files it reads
        settings = wandb_setup.singleton().settings
    server = settings.base_url
    if settings.api_key or settings.identity_token_file or wbauth.read_netrc_auth(host=server):
        yield Check("W&B", "ok", f"{version}, logged in to {server}")
    else:
        cost = "logging.wandb.mode: online goes on offline"
        yield Check("W&B", "warn", f"{version}, not logged in to {server}", cost, "wandb login")


def _memory() -> Iterator[Check]:
    import psutil

    yield Check("memory", "ok", f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {os.cpu_count()} CPU cores")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Check("/dev/shm", "warn", "not there", "data loading with data.num_workers > 0 fails",
                    "mount it, or set data.num_workers: 0")  # fmt: skip
        return
    import torch

    free = shutil.disk_usage(shared).free
    needed = SHARED_MEMORY_PER_GPU * max(1, torch.cuda.device_count())
    found = f"{free / 2**30:.1f} GiB free"
    if free >= needed:
        yield Check("/dev/shm", "ok", found)
    else:
        yield Check("/dev/shm", "fail" if torch.cuda.is_available() else "warn", found,
                    f"NCCL and loader processes die with a bus error below about {needed / 2**30:.0f} GiB",
                    "in containers: --shm-size=16g, or --ipc=host")  # fmt: skip


def _storage() -> Iterator[Check]:
    for name, folder in (("working directory", Path.cwd()), ("temporary directory", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / 2**30
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".megasparse-doctor-"):
                pass
        except OSError as error:
            yield Check(name, "fail", f"{folder}: cannot write ({error.strerror})",
                        "runs, checkpoints and caches cannot be written", "choose another one")  # fmt: skip
            continue
        few: Status = "ok" if free > 5 else "warn"
        yield Check(name, few, f"{folder}, {free:.0f} GiB free", "" if free > 5 else "checkpoints need space")


_CHECKS: tuple[Callable[[], Iterator[Any]], ...] = (
    _python, _torch, _megatron_core, _gpus, _transformer_engine, _apex, _compilers, _kernels, _wandb, _memory, _storage,
)  # fmt: skip
