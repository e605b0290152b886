"""Initial weights that depend on the seed and the parameter's name alone, not on the parallel layout.

Every weight matrix is drawn in blocks of whole rows, each from its own generator seeded by (seed, name, block), and
each rank keeps its part. A model so starts the same at any tensor, pipeline, virtual pipeline, context and data
parallelism, on the same kind of device (the generators of CPU and CUDA differ). A rank draws only the blocks it has
rows in.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

_BLOCK_ROWS = 256
_DOWN = ".linear_fc2.weight"
_SCALED = (".linear_proj.weight", _DOWN)
"""Projections that write to the residual stream."""


def global_name(name: str, first_layer: int, tied: bool) -> str:
    """A parameter's name over the whole model, from its name in one chunk.

    Args:
        name: as `named_parameters` of the chunk gives it.
        first_layer: 0-based number, over the whole model, of the chunk's first layer.
        tied: the output layer is the word embedding (the last stage then has a copy of its own).
    """
    if tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return re.sub(r"(?<=\blayers\.)\d+", lambda match: str(int(match.group()) + first_layer), name)


def shard_rows(
    rows: int, columns: int, rank: int, size: int, dim: int, stride: int
) -> tuple[list[tuple[int, int]], slice]:
    """Which part of the whole matrix a shard [rows, columns] is: runs of rows (start, stop), and the columns.

    `stride` parts of the rows are cut over the ranks separately (2: gate and up), as Megatron's partition_stride.
    """
    if dim == 1:
        return [(0, rows)], slice(rank * columns, (rank + 1) * columns)
    part = rows // stride
    return [(s * part * size + rank * part, s * part * size + (rank + 1) * part) for s in range(stride)], slice(None)


@torch.no_grad()
def fill_normal(weight: Tensor, name: str, seed: int, std: float, rank: int = 0, size: int = 1) -> None:
    """Fill a weight [rows, columns], sharded as its attributes say, with normal(0, std) by `seed` and `name`.

    A down projection stored [D, H] gets the transpose of one stored by neuron, [H, D]: a dense model so starts with
    the weights of the sparse one.
    """
    dim = getattr(weight, "partition_dim", -1) if getattr(weight, "tensor_model_parallel", False) else -1
    stride = max(1, getattr(weight, "partition_stride", 1))
    if name.endswith(_DOWN) and dim == 1:
        weight, dim = weight.t(), 0
    if dim < 0:
        rank, size = 0, 1
    rows, columns = weight.shape
    runs, kept = shard_rows(rows, columns, rank, size, dim, stride)
    width = columns * size if dim == 1 else columns
    generator = torch.Generator(device=weight.device)
    written = 0
    for start, stop in runs:
        for block in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
            digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            values = torch.empty(_BLOCK_ROWS, width, dtype=torch.float32, device=weight.device)
            values.normal_(0.0, std, generator=generator)
            first = block * _BLOCK_ROWS
            used = values[max(start - first, 0) : min(stop - first, _BLOCK_ROWS), kept]
            weight[written : written + used.shape[0]].copy_(used)
            written += used.shape[0]


@torch.no_grad()
def initialize(
    chunks: Iterable[torch.nn.Module],
    *,
    seed: int,
    std: float,
    num_layers: int,
    scale_output: bool,
    tied: bool,
    rank: int,
    size: int,
) -> None:
    """Give every weight matrix of a model's chunks on this rank its initial value, and every bias zero.

    The gains of norms are ones already.

    Args:
        std: standard deviation.
        scale_output: divide it by sqrt(2 * num_layers) for projections that write to the residual stream.
        rank, size: of the tensor-parallel group.
    """
    for chunk in chunks:
        layers = list(chunk.decoder.layers)  # type: ignore[union-attr, arg-type]
        first_layer = layers[0].layer_number - 1 if layers else 0
        for local, parameter in chunk.named_parameters():
            if parameter.dim() < 2:
                if local.endswith("bias"):
                    parameter.zero_()
                continue
            name = global_name(local, first_layer, tied)
            scale = 1.0 / math.sqrt(2 * num_layers) if scale_output and name.endswith(_SCALED) else 1.0
            fill_normal(parameter, name, seed, std * scale, rank, size)
