"""Lets Megatron-Core save the distributed optimizer's state as it is where its buckets end in padding.

A gradient buffer is cut into buckets, each padded to a multiple of 128 and of the data-parallel size. To save its state
in the `fully_reshardable` format, Megatron (0.16 to 0.19) gathers a buffer without that padding, but looks every
parameter up at its place with it: all that lie behind a padded bucket would be saved shifted, master weights too, and a
run that resumes from them would go on with other weights. Data-parallel sizes that are no power of two pad nearly every
bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Places = dict[Any, tuple[int, int, int]]
"""Parameter -> its begin and end in the buffer, its bucket."""


def save_state_without_padding(optimizer: Any) -> None:
    """Have a new optimizer of `get_megatron_optimizer` find each parameter in a buffer that is gathered to be saved."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            _correct(part)


def _correct(optimizer: DistributedOptimizer) -> None:
    build = optimizer.sharded_param_state_fully_reshardable

    def build_without_padding(*arguments: Any, **options: Any) -> Any:
        with _without_padding(optimizer.buffers):
            return build(*arguments, **options)

    optimizer.sharded_param_state_fully_reshardable = build_without_padding


@contextmanager
def _without_padding(buffers: list[Any]) -> Iterator[None]:
    """In here buffers say where their parameters would be if no bucket were padded."""
    padded: list[Places] = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places_without_padding(buffer.buckets, places)
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def places_without_padding(buckets: list[Any], places: Places) -> Places:
    """`places` in a buffer of these buckets, had they no padding; each begins at `offset`, holds `numel_unpadded`."""
    padding, end = [], 0
    for bucket in buckets:
        padding.append(bucket.offset - end)
        end += bucket.numel_unpadded
    return {
        parameter: (first - padding[bucket], last - padding[bucket], bucket)
        for parameter, (first, last, bucket) in places.items()
    }
