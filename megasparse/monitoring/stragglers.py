"""Names ranks that are slower than the others of their pipeline stage."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

STEPS = 20
"""Steps over which a rank is judged, at least."""
SLOW = 1.25
"""Times the median of its stage, above which a rank is slow: a GPU at a lower clock, another process on the node."""


class Stragglers:
    """Sums each rank's own time of a step (`training/own_time.py`) and judges every STEPS steps.

    Args:
        hosts: of every rank.
        stages: pipeline stage of every rank; stages have different work.
    """

    def __init__(self, hosts: Sequence[str], stages: Sequence[int]) -> None:
        self._hosts, self._stages = list(hosts), list(stages)
        self._sums, self._steps = [0.0] * len(hosts), 0
        self._named: list[int] = []

    def add(self, own: Sequence[float], steps: int) -> str | None:
        """Takes what every rank took for `steps` steps together, in seconds.

        Returns:
            a sentence that names slow ranks where it is time to judge, and they are others than the last time.
        """
        self._sums = [before + seconds for before, seconds in zip(self._sums, own, strict=True)]
        self._steps += steps
        if self._steps < STEPS:
            return None
        means = [total / self._steps for total in self._sums]
        self._sums, self._steps = [0.0] * len(means), 0
        medians = self._medians(means)
        slow = [rank for rank, mean in enumerate(means) if mean > SLOW * medians[rank]]
        if slow == self._named:
            return None
        self._named = slow
        if not slow:
            return "SLOW: no rank any more"
        worst = max(slow, key=lambda rank: means[rank])
        names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in slow[:6])
        more = f" and {len(slow) - 6} more" if len(slow) > 6 else ""
        return (
            f"SLOW: {names}{more}: up to {means[worst]:.3f} s of own work a step, the median is "
            f"{medians[worst]:.3f} s; every step waits for that"
        )

    def slowest(self, own: Sequence[float]) -> tuple[int, float]:
        """The rank that is slowest against its stage, and its time over the stage's median."""
        shares = [seconds / max(median, 1e-9) for seconds, median in zip(own, self._medians(own), strict=True)]
        rank = max(range(len(shares)), key=shares.__getitem__)
        return rank, shares[rank]

    def _medians(self, values: Sequence[float]) -> list[float]:
        """For every rank, the median of its stage."""
        stages: dict[int, list[float]] = {}
        for value, stage in zip(values, self._stages, strict=True):
            stages.setdefault(stage, []).append(value)
        medians = {stage: statistics.median_low(own) for stage, own in stages.items()}
        return [medians[stage] for stage in self._stages]
