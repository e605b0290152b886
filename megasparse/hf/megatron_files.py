"""Megatron's distributed checkpoints (`torch_dist`), tensor by tensor, in one process and without a model.

They are checkpoints of torch.distributed.checkpoint: every tensor has one global shape and is stored as blocks,
whatever the parallel layout that wrote it. Tensors of layers are stacked over all layers of the model,
[layers, ...]. Beside them lie `metadata.json` (the format's name) and `common.pt` (plain values); Megatron-Core 0.19
keeps the plain values among the tensors instead.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megasparse.hf.errors import ConvertError
from megasparse.hf.tensors import Weight, chunks

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of metadata.json."""

COMMON = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"
"""Where Megatron-Core 0.19 keeps them: a pickled list of one dict."""

_LAYER_OBJECTS = tuple(
    f"decoder.layers.{name}_extra_state"
    for name in (
        "self_attention.linear_qkv.", "self_attention.linear_proj.", "self_attention.core_attention.",
        "self_attention.q_layernorm.", "self_attention.k_layernorm.", "self_attention.linear_qkv.layer_norm_",
        "mlp.linear_fc1.", "mlp.linear_fc2.", "mlp.linear_fc1.layer_norm_",
    )
)  # fmt: skip
"""Modules that keep an "extra state" in checkpoints: Megatron's linear layers (nothing in it without fp8), and those
of Transformer Engine. Loading asks for those of the modules that are built, and passes over the others."""

_ALIASES = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}
"""Keys of norms that stand alone, in checkpoints of other layer specs."""


class CheckpointReader:
    """The tensors of one checkpoint directory.

    Raises ConvertError where the directory is no such checkpoint or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = dcp.FileSystemReader(path)
        try:
            self._metadata = self._reader.read_metadata()
        except FileNotFoundError:
            raise ConvertError(
                f"{path / '.metadata'}: missing; {path} is not a Megatron torch_dist checkpoint"
            ) from None
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
            raise ConvertError(f"{path / '.metadata'}: cannot be read ({error}); use another checkpoint") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Finds truncated files before anything is written."""
        ends: dict[str, int] = {}
        for info in (self._metadata.storage_data or {}).values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.exists():
                raise ConvertError(f"{file}: missing; the checkpoint is incomplete, use another one")
            if file.stat().st_size < end:
                raise ConvertError(
                    f"{file}: truncated ({file.stat().st_size} bytes, at least {end} expected); use another checkpoint"
                )

    def common(self) -> dict[str, Any]:
        """The plain values saved beside the tensors."""
        info = (self._metadata.storage_data or {}).get(MetadataIndex(_COMMON_KEY))
        file = self.path / (COMMON if info is None else info.relative_path)
        try:
            if info is None:
                return dict(torch.load(file, map_location="cpu", weights_only=False))
            with file.open("rb") as stream:
                stream.seek(info.offset)
                (values,) = torch.load(io.BytesIO(stream.read(info.length)), map_location="cpu", weights_only=False)
            return dict(values)
        except Exception as error:  # torch.load raises many types for a damaged file
            raise ConvertError(f"{file}: cannot be read ({error}); use another checkpoint") from None

    def _entry(self, weight: Weight) -> tuple[str, TensorStorageMetadata]:
        entries = self._metadata.state_dict_metadata
        for key in (weight.key, _ALIASES.get(weight.key, weight.key)):
            entry = entries.get(key)
            if isinstance(entry, TensorStorageMetadata):
                return key, entry
        raise ConvertError(f"{self.path}: has no tensor {weight.key}; it is a checkpoint of another model")

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._entry(weight)[1].properties.dtype

    def check(self, weight: Weight, num_layers: int) -> None:
        """Raises ConvertError where the weight is missing or of another shape. The padding of a vocabulary may "
        "differ."""
        key, entry = self._entry(weight)
        expected = weight.shape if weight.layer is None else (num_layers, *weight.shape)
        same = tuple(entry.size) == expected
        if weight.kind == "vocab":
            same = tuple(entry.size[1:]) == expected[1:]
        if not same:
            raise ConvertError(
                f"{self.path}: {key} is {list(entry.size)}, and its configuration says {list(expected)}; it is a "
                "checkpoint "
                "of another model"
            )

    def vocab_rows(self, weight: Weight) -> int:
        """Rows of a padded vocabulary as stored."""
        return int(self._entry(weight)[1].size[0])

    def read(self, weight: Weight) -> Tensor:
        """A weight, whole; one of a padded vocabulary with as many rows as are stored."""
        key, entry = self._entry(weight)
        if weight.layer is None:
            offsets, sizes = (0,) * len(entry.size), tuple(entry.size)
        else:
            offsets, sizes = (weight.layer, *(0,) * (len(entry.size) - 1)), (1, *entry.size[1:])
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        block = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [block])
        read = sum(math.prod(item.lengths) for item in items)
        if read != target.numel():
            raise ConvertError(f"{self.path}: parts of {weight.where} are missing; use another checkpoint")
        try:
            self._reader.read_data(LoadPlan(items), _IntoOne(target)).wait()
        except Exception as error:  # damaged files end in many types
            raise ConvertError(
                f"{self.path}: {weight.where} cannot be read ({error}); use another checkpoint"
            ) from None
        return target if weight.layer is None else target[0]


class _IntoOne(LoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are read")

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is made by the caller")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


def write_checkpoint(
    path: Path,
    weights: Sequence[Weight],
    num_layers: int,
    dtype: torch.dtype,
    common: dict[str, Any],
    read: Callable[[Weight], Tensor],
    done: Callable[[int], None],
) -> None:
    """Write a checkpoint into an empty directory, one weight in memory at a time.

    Args:
        read: the Megatron tensor of a weight, of type `dtype`.
        done: called with the number of bytes after each block.
    """
    writer = dcp.FileSystemWriter(path, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
    planner = _Streaming(weights, num_layers, dtype, read, done)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except dcp.CheckpointException as error:  # wraps whatever was raised, an interruption too
            raise next(iter(error.failures.values()))[0] from None
    torch.save(common, path / COMMON)
    (path / "metadata.json").write_text(json.dumps(FORMAT))


class _Streaming(DefaultSavePlanner):
    """Plans all blocks from the shapes alone and makes each tensor when the writer asks for it."""

    def __init__(
        self,
        weights: Sequence[Weight],
        num_layers: int,
        dtype: torch.dtype,
        read: Callable[[Weight], Tensor],
        done: Callable[[int], None],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._num_layers, self._dtype, self._read, self._done = num_layers, dtype, read, done
        self._weights = {(weight.key, weight.layer): weight for weight in weights}
        self._current: tuple[Weight, Tensor] | None = None

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = []
        for weight in self._weights.values():
            for offsets, sizes in chunks(weight):
                if weight.layer is None:
                    whole = torch.Size(weight.shape)
                else:
                    offsets, sizes = (weight.layer, *offsets), (1, *sizes)
                    whole = torch.Size((self._num_layers, *weight.shape))
                block = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = TensorWriteData(chunk=block, properties=TensorProperties(dtype=self._dtype), size=whole)
                index = MetadataIndex(weight.key, block.offsets)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        names = [f"{name}/shard_{i}_{self._num_layers}" for name in _LAYER_OBJECTS for i in range(self._num_layers)]
        for name in (*names, "decoder.final_layernorm._extra_state/shard_0_1"):
            items.append(WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # Megatron-Core packs each object into a list
            return nothing
        assert write_item.tensor_data is not None
        block = write_item.tensor_data.chunk
        stacked = write_item.index.fqn.startswith("decoder.layers.")
        layer = block.offsets[0] if stacked else None
        weight = self._weights[write_item.index.fqn, layer]
        if self._current is None or self._current[0] is not weight:
            self._current = None  # frees the one before first
            self._current = (weight, self._read(weight))
        tensor = self._current[1]
        if tuple(tensor.shape) != weight.shape or tensor.dtype != self._dtype:
            raise AssertionError(f"{weight.where}: {tuple(tensor.shape)} {tensor.dtype}, planned {self._dtype}")
        offsets, sizes = (block.offsets[1:], block.sizes[1:]) if stacked else (block.offsets, block.sizes)
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            tensor = tensor.narrow(dim, offset, size)
        self._done(tensor.nbytes)
        return (tensor.unsqueeze(0) if stacked else tensor).clone()
