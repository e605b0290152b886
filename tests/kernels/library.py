"""Single kernels for the tests: compiles them with the plain C entry points of `launch.cu`."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from megasparse.mlp.build import NVCC_FLAGS, find_nvcc, source_directory

SOURCES = ("gate.cu", "gather_nt.cu", "gather_nt_plan.cu")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels (about half a minute, once a process)."""
    root = source_directory()
    target = Path(tempfile.mkdtemp(prefix="megasparse-kernel-tests-")) / "kernels.so"
    command = [str(find_nvcc()), *NVCC_FLAGS, "-shared", "--threads=0", "-I", str(root / "include"), "-I", str(root)]
    command += ["-o", str(target), str(Path(__file__).parent / "launch.cu"), *(str(root / name) for name in SOURCES)]
    subprocess.run(command, check=True, capture_output=True)
    loaded = ctypes.CDLL(str(target))
    for name in ("gate_workspace_bytes", "gather_nt_plan_bytes", "gather_nt_partials", "gather_nt_partials_per_unit"):
        getattr(loaded, f"test_{name}").restype = ctypes.c_int64
    return loaded


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def sm_count() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory that a test would notice if it were not written: NaN, or a wild integer."""
    value = float("nan") if dtype.is_floating_point else 0x5A5A5A5A
    return torch.full(shape, value, dtype=dtype, device="cuda")


def relative_error(result: Tensor, expected: Tensor) -> float:
    difference = (result.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))
