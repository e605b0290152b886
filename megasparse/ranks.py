"""What one rank or each rank does for itself while the others wait: what it gives, or raises, is told to all.

What a file system refuses to one rank alone would else leave the others in their next collective until its timeout.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megasparse.host import host_name

Result = TypeVar("Result")


class StorageError(RuntimeError):
    """The file system failed: full, stale, away. Trying again may help."""

    exit_code = 1
    """Of `megasparse`."""


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Runs `action` on rank 0 and gives its result, or the exception that it raised, to all ranks. Collective.

    Raises:
        StorageError: in place of an OSError.
    """
    answers: list[Any] = [_attempt(action) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answers, src=0)
    return _results(answers)[0]


def on_every_rank(action: Callable[[], Result]) -> list[Result]:
    """Runs `action` on every rank and gives all results, in the ranks' order, to all ranks. Collective.

    Raises:
        Exception: of the first rank where `action` raised one, on all ranks; StorageError in place of an OSError.
    """
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, _attempt(action))
    return _results(answers)


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """What `action` gives, or raises: whatever it is, the other ranks wait."""
    try:
        return action(), None
    except OSError as error:
        where = f"{this_rank()}: {error.filename}" if error.filename else this_rank()
        return None, StorageError(f"{where}: {error.strerror or error}")
    except Exception as error:
        return None, error if _travels(error) else RuntimeError(f"{this_rank()}: {type(error).__name__}: {error}")


def _travels(error: Exception) -> bool:
    """Whether the other ranks can take it from its pickle; many a library's exception they cannot."""
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:
        return False


def _results(answers: list[tuple[Result, Exception | None]]) -> list[Result]:
    for _, error in answers:
        if error is not None:
            raise error
    return [result for result, _ in answers]


def this_rank() -> str:
    """For messages."""
    return f"rank {dist.get_rank()} on {host_name()}"
