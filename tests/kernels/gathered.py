"""Calls of the gathered down product and the weight gradients, compiled for the tests as a library without torch."""

import ctypes
import functools
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megasparse.mlp import build
from tests.kernels.packed import Packed

SOURCES = ("gather_down.cu", "wgrad.cu", "wgrad_lists.cu")


@functools.cache
def library() -> ctypes.CDLL:
    root = build.source_directory()
    directory = Path(tempfile.mkdtemp(prefix="megasparse-kernel-tests-"))
    sources = [*(root / name for name in SOURCES), Path(__file__).parent / "launch_gather_down.cu"]

    def compile_one(source: Path) -> str:
        target = str(directory / f"{source.stem}.o")
        flags = [*build.NVCC_FLAGS, f"-I{root}", f"-I{root / 'include'}"]
        subprocess.run([str(build.find_nvcc()), *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sources))
    path = str(directory / "gathered.so")
    subprocess.run([str(build.find_nvcc()), "-shared", "-o", path, *objects], check=True)
    loaded = ctypes.CDLL(path)
    loaded.test_gather_down_bytes.restype = loaded.test_wgrad_bytes.restype = ctypes.c_int64
    return loaded


def _pointers(*tensors: Tensor | None) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _common() -> tuple[ctypes.c_int, ctypes.c_void_p]:
    count = torch.cuda.get_device_properties(0).multi_processor_count
    return ctypes.c_int(count), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _scratch(size: int) -> Tensor:
    return torch.full((size,), 255, dtype=torch.uint8, device="cuda")


def gather_down(packed: Packed, pairs: list[tuple[Tensor, Tensor]], order: Tensor | None, out: Tensor) -> None:
    """out = sum over (dense [M, H] by position, weight [H, D]) of their products; `out` is poisoned first."""
    blocks = [packed.compact(dense) for dense, _ in pairs] + [None]
    weights = [weight for _, weight in pairs] + [None]
    pointers = _pointers(
        blocks[0], blocks[1], weights[0], weights[1], packed.union_idx, order, packed.block_ptr, packed.tile_order, out
    )
    sm_count, stream = _common()
    sizes = [ctypes.c_int64(value) for value in (packed.m, out.shape[1], packed.words * 64)]
    workspace = _scratch(library().test_gather_down_bytes(pointers, *sizes, sm_count))
    out.fill_(float("nan"))
    error = library().test_gather_down(pointers, *sizes, sm_count, ctypes.c_void_p(workspace.data_ptr()), stream)
    torch.cuda.synchronize()
    assert error == 0


def wgrad(
    packed: Packed,
    values: tuple[Tensor | None, Tensor, Tensor],
    x: Tensor,
    dy: Tensor,
    order: Tensor | None,
    dw_in: Tensor,
    dw_down: Tensor,
    output: int,
) -> None:
    """values: dg (None: not gated), du, h, dense [M, H] by position. output: 0 bf16, 1 fp32, 2 fp32 added."""
    gated = values[0] is not None
    lists = [None if dense is None else packed.pack(dense) for dense in values]
    pointers = _pointers(packed.mask, packed.offset, packed.row_ptr, *lists, x, dy, order, dw_in, dw_down)
    sm_count, stream = _common()
    sizes = [ctypes.c_int64(value) for value in (packed.m, packed.h, x.shape[1])]
    numbers = (ctypes.c_int(output), ctypes.c_int(gated), *sizes)
    workspace = _scratch(library().test_wgrad_bytes(pointers, *numbers, sm_count))
    error = library().test_wgrad(pointers, *numbers, sm_count, ctypes.c_void_p(workspace.data_ptr()), stream)
    torch.cuda.synchronize()
    assert error == 0
