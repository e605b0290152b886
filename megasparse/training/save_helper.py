"""The process through which Megatron's checkpoint writers report to the rank that started them."""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megasparse.parent import end_with_parent


def start_save_helper() -> None:
    """Starts the process through which Megatron's writers report, so that it ends when this one is killed.

    Megatron would start one itself, which stays for ever then.
    """
    if getattr(filesystem_async, "_results_queue", "no such variable") is None:
        helper = SyncManager(ctx=multiprocessing.get_context("spawn"))
        helper.start(end_with_parent)
        filesystem_async._results_queue = _Results(helper.Queue())


class _Results:
    """A queue of the helper as Megatron's writers and reader use it, of which the helper sees bytes alone.

    To take in what they say it would import torch: seconds in every rank's first save, and 250 MB while the run lasts.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())
