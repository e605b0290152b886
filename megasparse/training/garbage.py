"""Python's garbage collector, run between steps, on all ranks after the same ones.

Left to itself it runs in the middle of steps, on each rank at another time, while all others wait at the next
collective; and each time looks at every object that was there before training (torchtitan and Megatron-LM's
`--manual-gc` do the same).
"""

import gc
from types import TracebackType

INTERVAL = 100
"""Steps. Tensors die without it, as soon as nothing refers to them: what waits are rings of objects."""


class GarbageCollection:
    """Context manager around training: automatic collection is off within."""

    def __enter__(self) -> "GarbageCollection":
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def after_step(self, step: int, *, paused: bool) -> None:
        """Collects where it is due, and where training paused after this step: what did so left more behind."""
        if paused or step % INTERVAL == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.enable()
        gc.unfreeze()
