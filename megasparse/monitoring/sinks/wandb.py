"""Weights & Biases: one W&B run for one training run, whatever restarts and rollbacks it goes through.

The W&B step is the iteration. The run's id lies in `<directory>/wandb.json` and in every checkpoint.

**Online.** A restart resumes the run by its id. W&B drops points whose step is not beyond the last one it has, so
after a rollback (a restart from an older checkpoint than the last point logged) the repeated iterations are logged at
`iteration + offset`, where the offset is the number of iterations done twice, and charts are told to use
`progress/step`, which is logged with every point, as their x axis. No point is lost; a run that was never rolled back
has offset 0 and keeps W&B's own axis. Where W&B has nothing of a run that has gone on offline until now, metrics.jsonl
is replayed, as below. A server that is away when the run ends is waited for FINISH_SECONDS.

**Offline.** W&B cannot continue an offline run: each process writes a directory of its own, and uploading a second
one of the same id replaces the first (wandb/wandb#3841). So a restart replays metrics.jsonl, cut back to
the step it resumes from, into its new directory: the newest directory always holds the *whole* run, and

    wandb sync <directory>/wandb/latest-run

uploads it. Directories of earlier starts are moved to `<directory>/wandb-superseded`, out of the sight of `wandb sync`.
Without metrics.jsonl there is nothing to replay; it is the source of truth.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb

from megasparse.monitoring.record import Record
from megasparse.small_files import read_json, write_json

logger = logging.getLogger(__name__)

STATE_FILE = "wandb.json"
STEP_METRIC = "progress/step"
FINISH_SECONDS = 60.0
"""How long the end of a run waits for W&B's server: a job that is about to be killed has two minutes."""

SERVICE_SECONDS = 300
"""How long W&B's own process may take to start; by itself W&B gives up after 30 s, and the run would end with it. On a
busy node, or from shared storage while a thousand ranks import from it, that is not enough."""


class WandbSink:
    """Sends records to W&B. Make it on the writing rank only."""

    def __init__(
        self,
        directory: Path,
        *,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None = None,
        name: str | None = None,
        tags: Iterable[str] = (),
        config: dict[str, Any] | None = None,
        git_commit: str | None = None,
        run_id: str | None = None,
        resumed_step: int = 0,
        history: Iterable[Record] = (),
    ) -> None:
        """Start or resume the W&B run.

        Args:
            directory: of the run; W&B's files go to `directory`/wandb.
            run_id: what the checkpoint says; None: what `directory`/wandb.json says, else a new one.
            resumed_step: iterations already done.
            history: the records up to `resumed_step`, replayed when the run is offline or W&B does not know it yet.

        Where W&B cannot be reached the run goes on offline, with a warning: monitoring does not stop training.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._state_path = directory / STATE_FILE
        previous = read_json(self._state_path)
        self.run_id = run_id or previous.get("run_id") or secrets.token_hex(4)
        if previous.get("run_id") != self.run_id:
            previous = {}
        self._offset = 0
        self._last_step = resumed_step
        arguments: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "tags": list(tags),
            "config": config or {},
            "id": self.run_id,
            "dir": str(directory),
        }
        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "git_commit": git_commit,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
        }
        # W&B's process of the program that started this one, which may have ended it: this run gets its own.
        os.environ.pop(wandb.env.SERVICE, None)
        os.environ.setdefault("WANDB__SERVICE_WAIT", str(SERVICE_SECONDS))  # W&B takes this from nowhere else
        run = self._start_online(arguments, settings, previous, resumed_step) if mode == "online" else None
        has_past = run is not None and run.starting_step > 0
        if not has_past:
            before = sorted((directory / "wandb").glob(f"offline-run-*-{self.run_id}"))
            _move_away(before, directory / "wandb-superseded")
        if run is None:
            run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)
        self._run = run
        for record in () if has_past else history:
            self._log(record)
        self._save_state()

    def _start_online(
        self, arguments: dict[str, Any], settings: dict[str, Any], previous: dict[str, Any], resumed_step: int
    ) -> Any:
        client = logging.getLogger("wandb")
        level = client.level
        client.setLevel(logging.CRITICAL)  # it logs a failure's stack trace; the warning below says what matters
        try:
            run = wandb.init(mode="online", resume="allow", settings=wandb.Settings(**settings), **arguments)
        except wandb.errors.Error as error:
            logger.warning(
                "W&B cannot be reached or refuses the login (%s); the run goes on offline. "
                "Check `wandb login` and the network, and upload later with `wandb sync`.",
                error,
            )
            wandb.teardown()  # its service process takes the run's id for one that is in use
            return None
        finally:
            client.setLevel(level)
        self._offset = step_offset(previous if run.starting_step else {}, run.starting_step, resumed_step)
        if self._offset:
            run.define_metric(STEP_METRIC)
            run.define_metric("*", step_metric=STEP_METRIC)
            logger.warning(
                "this run was rolled back: its W&B step is the iteration plus %d from here on; "
                "charts use %s as their x axis",
                self._offset,
                STEP_METRIC,
            )
        logger.info("W&B: %s", run.url)
        return run

    def write(self, record: Record) -> None:
        """Raises OSError where W&B's own process is gone; W&B sees nothing more of this start then."""
        self._log(record)
        self._last_step = record.step
        self._save_state()

    def _log(self, record: Record) -> None:
        # `null` stands for NaN in records; W&B takes NaN as it is.
        metrics = {name: math.nan if value is None else value for name, value in record.metrics.items()}
        self._run.log({**metrics, STEP_METRIC: record.step}, step=record.step + self._offset)

    def _save_state(self) -> None:
        state = {"run_id": self.run_id, "offset": self._offset, "last_step": self._last_step}
        write_json(self._state_path, state)

    def close(self, failed: bool = False) -> None:
        """Upload what is left (online) and end the W&B run, there as failed or finished; a later start resumes it."""
        directory = Path(self._run.dir).parent
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            logger.warning(
                "W&B's server has not taken all metrics within %g s, and the run ends without it. They are on disk; "
                "upload them, before the run goes on, with `wandb sync --include-online %s`",
                FINISH_SECONDS,
                directory,
            )


def step_offset(previous: Mapping[str, Any], starting_step: int, resumed_step: int) -> int:
    """What to add to an iteration so that its W&B step is beyond every one that the run has.

    Args:
        previous: wandb.json of the start before: `last_step` (iteration) and `offset`; {} for none.
        starting_step: the first W&B step that the server still takes.
        resumed_step: iterations done.

    The server may lack the last points of a killed process, or this directory those of another machine.
    """
    offset = int(previous.get("offset", 0))
    logged = max(int(previous.get("last_step", 0)) + offset, starting_step - 1)
    return max(offset, logged - resumed_step)


def _move_away(directories: Sequence[Path], to: Path) -> None:
    for directory in directories:
        to.mkdir(exist_ok=True)
        target, copy = to / directory.name, 1
        while target.exists():  # two starts within a second
            target, copy = to / f"{directory.name}.{copy}", copy + 1
        directory.rename(target)
