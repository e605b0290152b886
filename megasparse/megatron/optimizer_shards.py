"""Saves and loads the distributed optimizer's state without gathering it: each rank its own share, piece by piece.

In the `fully_reshardable` format every weight has three tensors of its own whole shape, which any layout can load. To
write them, Megatron (0.16 to 0.19) gathers the state of a model-parallel shard in the host memory of every
data-parallel rank, 12 bytes a parameter, several times over; to read them, each rank takes the whole and keeps its
part. But files may hold a tensor in pieces of any size, and a rank's share of a weight, a range of its flattened
elements, is at most three rectangles: the end of one row, whole rows, the beginning of another. So every rank writes
and reads just these, as views of its own state. Keys, shapes and types are Megatron's: either reads what the other
wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megasparse.megatron.neuron_weight import TransposedWeightFactory

STATES = ("param", "exp_avg", "exp_avg_sq")
"""What Megatron saves of each weight: the fp32 master weight and Adam's two moments."""


class Rectangle(NamedTuple):
    """Part of a matrix: its first row and column, its size."""

    row: int
    column: int
    rows: int
    columns: int


def rectangles(start: int, end: int, width: int) -> list[Rectangle]:
    """The elements [start, end) of a matrix with rows of `width`, counted row by row: at most three, in their order."""
    found = []
    while start < end:
        row, column = divmod(start, width)
        if column or end - start < width:  # within one row
            found.append(Rectangle(row, column, 1, min(width - column, end - start)))
        else:
            found.append(Rectangle(row, 0, (end - start) // width, width))
        start += found[-1].rows * found[-1].columns
    return found


@dataclass(frozen=True)
class Block:
    """A part of a weight that lies in one piece in memory and in the checkpoint: a weight has one, or gate and up.

    Args:
        first: where it begins in the flattened parameter.
        shape: [rows, columns] or [elements], as in memory.
        place: where it lies in the checkpoint; without data.
        transposed: the checkpoint has its transpose.
    """

    first: int
    shape: tuple[int, ...]
    place: ShardedTensor
    transposed: bool = False


@dataclass(frozen=True)
class Piece:
    """One rectangle of a rank's share of a weight.

    Args:
        first, last: the elements of the rank's flat share that it holds.
        shape: [rows, columns] or [elements], as in memory.
        place: where it lies in the checkpoint, of the weight itself; without data.
        transposed: the checkpoint has its transpose.
    """

    first: int
    last: int
    shape: tuple[int, ...]
    place: ShardedTensor
    transposed: bool

    def view(self, share: torch.Tensor) -> torch.Tensor:
        """The piece of a flat share [elements], in its shape in the checkpoint. Shares memory with `share`."""
        inner = share[self.first : self.last].view(self.shape)
        if self.transposed:
            inner = inner.t()
        return inner[(None,) * (len(self.place.local_shape) - len(self.shape))]


def blocks(parameter: torch.Tensor, sharded: ShardedBase) -> list[Block]:
    """The blocks of a parameter that a model's `sharded_state_dict` describes by `sharded`.

    Raises:
        ValueError: it is stored in a way that this does not know.
    """
    shape = tuple(parameter.shape)
    if isinstance(sharded, TransposedWeightFactory):  # it would copy the weight to transpose it
        place = replace(sharded, data=torch.empty_like(parameter, device="meta")).build()
        return [Block(0, shape, place.without_data(), transposed=True)]
    parts = list(nested_values([sharded.build() if isinstance(sharded, ShardedTensorFactory) else sharded]))
    found: list[Block] = []
    end = 0
    for part in sorted(parts, key=lambda part: part.data.data_ptr()):
        first = (part.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if first != end or not part.data.is_contiguous() or part.data.shape[1:] != parameter.shape[1:]:
            break
        found.append(Block(first, tuple(part.data.shape), part.without_data()))
        end += part.data.numel()
    if end != parameter.numel() or len(shape) not in (1, 2):
        raise ValueError(
            f"{sharded.key}: the distributed optimizer's state of this weight {list(shape)} goes into no checkpoint: "
            f"they have it neither as it is, nor in blocks of whole rows, nor transposed ({type(sharded).__name__})"
        )
    return found


def pieces(parts: list[Block], start: int, end: int) -> Iterator[Piece]:
    """The pieces of the share [start, end) of a flattened parameter with these blocks."""
    for block in parts:
        width = block.shape[-1]
        size = width * (block.shape[0] if len(block.shape) == 2 else 1)
        first, last = max(start, block.first), min(end, block.first + size)
        for cut in rectangles(first - block.first, last - block.first, width):
            place = first - start
            first += cut.rows * cut.columns
            shape: tuple[int, ...] = (cut.rows, cut.columns)
            offset: tuple[int, ...] = (cut.row, cut.column)
            if len(block.shape) == 1:
                shape, offset = shape[1:], offset[1:]
            yield Piece(place, first - start, shape, _within(block, shape, offset), block.transposed)


def _within(block: Block, shape: tuple[int, ...], offset: tuple[int, ...]) -> ShardedTensor:
    """Where a rectangle of a block lies in the checkpoint.

    Axes before the weight's own, as that of the layers, become axes of the piece, of length 1: Megatron mistakes the
    shape of uneven pieces with `prepend_axis_num`.
    """
    if block.transposed:
        shape, offset = shape[::-1], offset[::-1]
    whole = block.place
    leading = len(whole.global_shape) - len(shape)
    inner = (begin + more for begin, more in zip(whole.global_offset[leading:], offset, strict=True))
    return replace(
        whole,
        local_shape=(1,) * leading + shape,
        global_offset=(*whole.global_offset[:leading], *inner),
        axis_fragmentations=None,  # pieces of uneven size
        prepend_axis_num=0,
    )


class OwnShards:
    """Stands for the methods by which a distributed optimizer saves and loads the format `fully_reshardable`."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        self._cuts: list[tuple[torch.nn.Parameter, list[Piece]]] = []

    def sharded_param_state(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """What this rank saves or loads: number of its parameter -> state -> number of the piece -> the piece.

        Args:
            model_sharded_state_dict: the model's, with its parameters themselves as data.
            is_loading: the pieces are to be loaded. They are views of the state then too, which is so loaded in
                place, but for master weights that are the weights themselves.
            metadata: Megatron's; nothing here depends on it.

        Raises:
            ValueError: a parameter is not in the model's, or is stored in a way that this does not know.
        """
        of_model, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        known = {item.data: item for item in nested_values(of_model)}
        self._cuts = []
        result: ShardedStateDict = {}
        for parameter, start, end in self._shares():
            if parameter not in known:
                raise ValueError(
                    f"a weight {list(parameter.shape)} of the optimizer is not in the model's sharded state: make that "
                    "with its parameters as they are (keep_vars)"
                )
            sharded = known[parameter]
            cuts = list(pieces(blocks(parameter, sharded), start, end))
            # Data-parallel ranks hold different pieces. Other replicas, as of norms over tensor parallelism, are such.
            replica = (*sharded.replica_id[:2], self._optimizer.distributed_optimizer_instance_id)  # type: ignore[index]
            state = self._state(parameter)
            result[len(self._cuts)] = {
                name: {
                    number: replace(
                        piece.place,
                        key=f"optimizer.state.{name}.{piece.place.key}",
                        data=None if is_loading and _share_memory(state[name], parameter) else piece.view(state[name]),
                        dtype=state[name].dtype,
                        replica_id=replica,
                    )
                    for number, piece in enumerate(cuts)
                }
                for name in STATES
            }
            self._cuts.append((parameter, cuts))
        return result

    @torch.no_grad()
    def load_param_state(self, state_dict: dict[int, dict[str, dict[int, torch.Tensor]]]) -> None:
        """Takes what was loaded as the last `sharded_param_state` asked for it.

        Raises:
            ValueError: it is something else.
        """
        if len(state_dict) != len(self._cuts):
            raise ValueError(
                f"the optimizer's loaded state is of {len(state_dict)} weights, this rank has shares of "
                f"{len(self._cuts)}: load what sharded_state_dict(is_loading=True) returned"
            )
        for index, (parameter, cuts) in enumerate(self._cuts):
            state = self._state(parameter)
            for name in STATES:
                for number, piece in enumerate(cuts):  # nothing is moved where it was loaded in place
                    piece.view(state[name]).copy_(state_dict[index][name][number])
            self._optimizer._set_main_param_and_optimizer_states(parameter, state)

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's flat shares of STATES, fp32, one parameter after the other."""
        for parameter, *_ in self._shares():
            yield self._state(parameter)

    def _shares(self) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        """The parameters of which this rank holds a part: [start, end) of the flattened one."""
        for ranges in self._optimizer.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, share in bucket["param_map"].items():
                        yield parameter, share["param"].start, share["param"].end

    def _state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """This rank's flat shares of STATES, fp32. They are the optimizer's own tensors where those are fp32."""
        state = self._optimizer._get_main_param_and_optimizer_states(parameter)
        return {name: state[name].detach().float() for name in STATES}


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """In fp32 a weight is its own master weight. Were both loaded in place, the last one would count: the rounded
    weight maybe, where the checkpoint is of bf16."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def save_own_shards(optimizer: Any) -> None:
    """Have a new optimizer of `get_megatron_optimizer` save and load its state so. Nothing where it is not sharded."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            shards = OwnShards(part)
            part.sharded_param_state_fully_reshardable = shards.sharded_param_state
            part.load_parameter_state_from_fully_reshardable = shards.load_param_state
