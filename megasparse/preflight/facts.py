"""What one rank sees: code, configuration, data, versions, space, GPU. Values are plain JSON; sizes are in bytes."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import megasparse
from megasparse.config import Config, ConfigError, LoadedConfig, check_files, load_with_origins
from megasparse.config.inputs import existing_parent
from megasparse.data.index_file import parts_of
from megasparse.host import host_name, installed_version
from megasparse.monitoring.nvml import open_device
from megasparse.training.checkpoint_files import leftover_bytes
from megasparse.training.launch_environment import Launch

Facts = dict[str, Any]

PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy")
BLOCK, BLOCKS = 1 << 16, 8
"""A data file is known by its size and by this many blocks of it, first and last included."""
WRITE_BYTES = 8 << 20
"""Written and flushed where checkpoints and caches go: a quota shows in no count of free bytes."""


def arrival(launch: Launch) -> Facts:
    """What a rank says first: host, the launcher's number of its node, and how many ranks its node should have."""
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or ""
    return {"host": host_name(), "node": node, "ranks_on_node": launch.local_world_size}


def gather_facts(
    config: str, overrides: Sequence[str], launch: Launch, world_size: int, say_stage: Callable[[str], None]
) -> tuple[Config | None, Facts]:
    """Look at everything; what fails ends as a line of `errors`, not as an exception.

    Data and storage are looked at by the first rank of each node alone.

    Args:
        world_size: ranks of the run, which may be more than check now.
        say_stage: told what comes next, so that a rank stuck in a dead file system can be named with its reason.

    Returns:
        the configuration, or None where it cannot be read, and the facts.
    """
    errors: list[list[str]] = []
    facts: Facts = {"errors": errors}

    def attempt(check: str, stage: str, action: Callable[[], Any]) -> Any:
        say_stage(stage)
        try:
            return action()
        except ConfigError as error:
            errors.append([check, str(error)])
        except Exception as error:  # whatever a broken node raises must reach the table
            errors.append([check, f"{type(error).__name__}: {str(error)[:400]}"])
        return None

    facts["code"] = attempt("code", "reading the package's files", code_hashes)
    facts["versions"] = attempt("versions", "importing Megatron-Core", versions)
    loaded: LoadedConfig | None = attempt("config", "reading the config", lambda: load_with_origins(config, overrides))
    cfg = loaded.config if loaded else None
    if cfg is not None:
        facts["config"] = flatten(cfg.model_dump(mode="json"))
        attempt("config", "checking the layout", lambda: cfg.validate(world_size))
        if launch.is_first_of_node:
            attempt("data", "looking for data and tokenizer", lambda: check_files(cfg))
            facts["data"] = attempt("data", "reading data files", lambda: data_hashes(cfg))
            facts["storage"] = attempt("storage", "looking at run and cache directory", lambda: storage(cfg))
    if torch.cuda.is_available():
        facts["gpu"] = attempt("GPU", "testing the GPU", lambda: examine_gpu(launch))
    return cfg, facts


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def code_hashes() -> dict[str, str]:
    """Hash of every file of the package, by path below it."""
    root = Path(megasparse.__file__).resolve().parent
    files = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(root)): _digest(path.read_bytes()) for path in files}


def versions() -> dict[str, str]:
    """Of Python, packages, CUDA, NCCL and driver. Imports what training imports: a broken library shows here."""
    found = {"python": platform.python_version()}
    found |= {package: installed_version(package) or "not installed" for package in PACKAGES}
    found["torch"] = torch.__version__
    found["CUDA"] = torch.version.cuda or "none"
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["GPUs visible"] = str(torch.cuda.device_count())
    importlib.import_module("megasparse.training.distributed")
    return found


def data_files(cfg: Config) -> Iterator[Path]:
    """Every file of data and tokenizer that a run reads."""
    for prefix in cfg.data.prefixes:
        yield from (Path(prefix + end) for end in (".bin", ".idx"))
    if cfg.data.tokenizer:
        tokenizer = Path(cfg.data.tokenizer)
        yield from sorted(path for path in tokenizer.iterdir() if path.is_file()) if tokenizer.is_dir() else [tokenizer]


def data_hashes(cfg: Config) -> dict[str, str]:
    """`size hash` of every data file, by its path; the hash is of some blocks."""
    files = [path for path in data_files(cfg) if path.is_file()]
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(map(str, files), pool.map(_file_hash, files), strict=True))


def _file_hash(path: Path) -> str:
    return f"{path.stat().st_size} {_digest(*parts_of(path, BLOCKS, BLOCK))}"


def storage(cfg: Config) -> list[dict[str, Any]]:
    """Free bytes of the directories that a run writes to, after a short write to each. Leaves nothing behind.

    What the start of the run will remove counts as free: an attempt that was killed may have left most of a checkpoint.
    """
    named = {"checkpoints": cfg.checkpoint_directory, "run": cfg.run_directory, "cache": cfg.cache_directory}
    looked: dict[Path, dict[str, Any]] = {}
    for name, path in named.items():
        folder = existing_parent(path)
        if folder not in looked:
            looked[folder] = {"names": [], "path": str(folder), **_write_a_little(folder)}
        looked[folder]["names"].append(name)
        if name == "checkpoints":
            looked[folder]["checkpoints"] = len(list(path.glob("step_*")))
    leftovers = leftover_bytes(cfg.checkpoint_directory)
    device = existing_parent(cfg.checkpoint_directory).stat().st_dev
    for folder, found in looked.items():
        found["free"] += leftovers if folder.stat().st_dev == device else 0
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return [*looked.values(), {"names": ["shared memory"], "path": "/dev/shm", "free": shared}]


def _write_a_little(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".megasparse-preflight-") as file:
            file.write(bytes(WRITE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return {"free": shutil.disk_usage(folder).free, "problem": error.strerror or str(error)}
    seconds = time.perf_counter() - started
    return {"free": shutil.disk_usage(folder).free, "write_rate": WRITE_BYTES / seconds}


def examine_gpu(launch: Launch) -> dict[str, Any]:
    """Memory, errors that the driver counted, rate of a matrix product and whether it repeats bit by bit."""
    from megasparse.doctor import product_rate
    from megasparse.training.distributed import device_of

    device = device_of(launch)
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    found: dict[str, Any] = {"name": torch.cuda.get_device_name(device), "free": free, "total": total}
    found |= _driver_counts(device)
    found["rate"] = product_rate(device.index)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16, generator=generator)
    product = a @ a
    found["repeats"] = all(torch.equal(product, a @ a) for _ in range(20)) and bool(product.isfinite().all())
    del a, product
    torch.cuda.empty_cache()
    return found


def _driver_counts(device: torch.device) -> dict[str, Any]:
    """Uncorrected memory errors since the driver was loaded, rows that could not be remapped; or {}."""
    try:
        pynvml, handle = open_device(device)
    except Exception:  # no driver library: NVML's own errors, OSError; the product's rate still counts
        return {}
    queries: dict[str, Callable[[], Any]] = {
        "uncorrected": lambda: pynvml.nvmlDeviceGetTotalEccErrors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        ),
        "remap_failed": lambda: bool(pynvml.nvmlDeviceGetRemappedRows(handle)[3]),
    }
    counts = {}
    for name, query in queries.items():
        try:
            counts[name] = query()
        except pynvml.NVMLError:  # not every board counts everything
            continue
    return counts
