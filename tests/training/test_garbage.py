"""When Python's garbage is collected during training."""

import gc
import weakref

import pytest

from megasparse.training.garbage import INTERVAL, GarbageCollection


class Ring:
    def __init__(self) -> None:
        self.itself = self


def test_rings_wait_for_the_end_of_their_interval() -> None:
    with GarbageCollection() as garbage:
        ring = weakref.ref(Ring())
        kept = [[0] for _ in range(100_000)]  # more allocations than automatic collection waits for
        garbage.after_step(INTERVAL - 1, paused=False)
        assert len(kept)
        assert ring() is not None
        assert not gc.isenabled()
        garbage.after_step(INTERVAL, paused=False)
        assert ring() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_pause_ends_them_too() -> None:
    with GarbageCollection() as garbage:
        ring = weakref.ref(Ring())
        garbage.after_step(1, paused=True)
        assert ring() is None


def test_it_is_automatic_again_after_an_error() -> None:
    with pytest.raises(RuntimeError), GarbageCollection():
        raise RuntimeError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
