"""Where the ranks meet: PyTorch's TCPStore on the first rank's host, every wait with a limit.

No process group is made here. A rank that never starts would leave everyone hanging in one; with a store, rank 0
sees who came, and who came but does not answer, and at what it is stuck.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megasparse.training.launch_environment import Launch

POLL_SECONDS = 0.05


class MeetingError(RuntimeError):
    """This rank could not reach rank 0; the message says what to look at."""


class Deadline:
    """Seconds that are left of a budget."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of the budget is used up, at least 0.1."""
        return max(0.1, self._end - (1.0 - share) * self.seconds - time.monotonic())

    def passed(self, share: float = 1.0) -> bool:
        return time.monotonic() >= self._end - (1.0 - share) * self.seconds


class Meeting:
    """Values by name and rank, seen by all ranks. A value is JSON; a rank writes each name once, `stage` excepted."""

    def __init__(self, launch: Launch, deadline: Deadline) -> None:
        """Rank 0 opens the store (torchrun's agents have one open already); others connect, up to half the budget.

        Raises:
            MeetingError: rank 0 could not be reached, or its port is taken.
        """
        self.launch = launch
        self.deadline = deadline
        try:
            self._store = self._connect(hosts_store=launch.rank == 0)
            self.deadline = Deadline(deadline.seconds)  # rank 0 may have come later: its budget began just now
        except (RuntimeError, ValueError, OSError) as error:  # torch's errors of sockets and stores are RuntimeErrors
            what = "cannot open" if launch.rank == 0 else "rank 0 does not answer at"
            raise MeetingError(
                f"{launch}: {what} {launch.master_address}:{launch.master_port} ({str(error).splitlines()[0][:200]}). "
                "Did rank 0 start, does the name resolve here, is the port free and open between the nodes? "
                "Set MASTER_ADDR and MASTER_PORT to choose others."
            ) from error

    def _connect(self, hosts_store: bool) -> dist.Store:
        launch = self.launch
        if launch.world_size == 1:
            return dist.HashStore()
        agents = launch.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(
            launch.master_address,
            launch.master_port,
            is_master=hosts_store and not agents,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.deadline.left(0.5)),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the agents' store outlives a restart
        return dist.PrefixStore(f"megasparse-preflight/{attempt}", store)

    def another_connection(self) -> dist.Store:
        """For a thread that may get stuck in it: one connection serves one request at a time."""
        return dist.PrefixStore("network", self._connect(hosts_store=False))

    def publish(self, name: str, value: Any) -> None:
        self._store.set(f"{name}/{self.launch.rank}", json.dumps(value))

    def say_stage(self, text: str) -> None:
        """What this rank is at; rank 0 quotes it if nothing follows."""
        self.publish("stage", text)

    def have(self, name: str, ranks: Iterable[int]) -> list[int]:
        """The ranks that have published `name`."""
        return [rank for rank in ranks if self._store.check([f"{name}/{rank}"])]

    def collect(self, name: str, share: float, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """What ranks (None: all) have published under `name` when all have, or when `share` of the budget is over."""
        wanted = list(range(self.launch.world_size) if ranks is None else ranks)
        keys = [f"{name}/{rank}" for rank in wanted]
        while not self._store.check(keys) and not self.deadline.passed(share):
            time.sleep(POLL_SECONDS)
        return {rank: json.loads(self._store.get(f"{name}/{rank}")) for rank in self.have(name, wanted)}

    def decide(self, name: str, value: Any) -> None:
        """Rank 0 tells everyone."""
        self._store.set(f"decision/{name}", json.dumps(value))

    def decision(self, name: str) -> Any:
        """What rank 0 decided.

        Raises:
            MeetingError: it said nothing in time.
        """
        key = f"decision/{name}"
        try:
            self._store.wait([key], timedelta(seconds=self.deadline.left()))
            return json.loads(self._store.get(key))
        except (RuntimeError, ValueError) as error:
            text = f"{self.launch}: rank 0 {self._last_of_rank_0()}, and did not come to: {name}"
            raise MeetingError(text) from error

    def _last_of_rank_0(self) -> str:
        try:
            stage = json.loads(self._store.get("stage/0")) if self._store.check(["stage/0"]) else "nothing"
        except RuntimeError:
            return "went away"
        return f"was last at: {stage}"

    def leave(self) -> None:
        """Rank 0 keeps the store open until everyone has read what they need, or for a few seconds."""
        self.publish("left", True)
        if self.launch.rank == 0:
            end = time.monotonic() + 5.0
            ranks = list(range(self.launch.world_size))
            while time.monotonic() < end and not self._store.check([f"left/{rank}" for rank in ranks]):
                time.sleep(POLL_SECONDS)
