"""The pre-flight check itself: every rank calls `preflight`, rank 0 prints one table, all return the same code."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megasparse.config import Config
from megasparse.config.inputs import existing_parent
from megasparse.doctor import print_checks
from megasparse.plan import checkpoint_bytes
from megasparse.preflight.compare import Finding, Gathered, compare, culprits
from megasparse.preflight.facts import arrival, gather_facts
from megasparse.preflight.meeting import Deadline, Meeting, MeetingError
from megasparse.preflight.network import measure
from megasparse.small_files import write_json
from megasparse.training.launch_environment import Launch, expand_nodelist, read_environment

ARRIVAL, ANSWERS, NETWORK = 0.5, 0.75, 0.97
"""Shares of the time limit by which ranks must have come, told what they see, and measured the network."""
SHARED_STORAGE_SECONDS = 5.0
"""How long a new file may take to show on the other nodes (NFS keeps directories for some seconds)."""


@dataclasses.dataclass(frozen=True)
class Options:
    """`timeout`: seconds; thousands of processes that import PyTorch from shared storage take minutes.
    `world_size`: ranks of the run to check the layout for, None: as many as check now.
    `min_free`: bytes that every directory must have free, beyond what checkpoints need."""

    timeout: float = 300.0
    world_size: int | None = None
    min_free: int = 1 << 30
    as_json: bool = False
    report: Path | None = None


def preflight(config: str, overrides: Sequence[str], options: Options) -> int:
    """Check the allocation for the run that `config` describes; call it on every rank.

    Returns:
        0, or 1 where something fails; the same on all ranks. Takes at most 1.5 times `options.timeout` after the
        start of the first process. Threads that are stuck may be left behind: `leave_process` ends them.
    """
    launch = read_environment()
    try:
        meeting = Meeting(launch, Deadline(options.timeout))
        meeting.publish("arrived", arrival(launch))
        work = _Work(launch, meeting)
        answer = work.within(meeting.deadline.left(ANSWERS), _look, config, overrides, options)
        cfg, facts = answer if answer is not None else (None, None)
        if facts is not None:
            meeting.publish("facts", facts)
        gathered = _gather(launch, meeting, cfg, options) if launch.rank == 0 else None
        if gathered is not None:
            _decide_plan(meeting, gathered, cfg)
        plan = meeting.decision("the measurements")
        meeting.publish("clock", time.time())
        if launch.is_first_of_node and plan["marker"]:
            meeting.say_stage("looking for rank 0's file")
            meeting.publish("sees", _appears(Path(plan["marker"])))
        if plan["network"]:
            meeting.say_stage("measuring the network")
            result = work.within(meeting.deadline.left(NETWORK), _measure, plan["nodes"])
            if result is not None:
                meeting.publish("network", result)
        if gathered is not None:
            code = _conclude(meeting, gathered, plan, options)
        else:
            code = int(meeting.decision("the verdict"))
        meeting.leave()
        return code
    except MeetingError as error:
        print(f"megasparse: {error}", file=sys.stderr)
        return 1


def leave_process(code: int) -> None:
    """End the process with `code` if a thread is stuck in it, in a file system or a collective; else return."""
    if any(thread.daemon and thread.name == _Work.NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Work:
    """Runs what may hang in threads of its own."""

    NAME = "megasparse-preflight"

    def __init__(self, launch: Launch, meeting: Meeting) -> None:
        self.launch, self.meeting = launch, meeting

    def within(self, seconds: float, action: Callable[..., Any], *arguments: Any) -> Any:
        """What `action(work, *arguments)` returns, or None if it is not done within `seconds`."""
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(action(self, *arguments)), daemon=True, name=self.NAME)
        thread.start()
        thread.join(seconds)
        return results[0] if results else None


def _look(work: _Work, config: str, overrides: Sequence[str], options: Options) -> tuple[Config | None, dict[str, Any]]:
    world = options.world_size or work.launch.world_size
    return gather_facts(config, overrides, work.launch, world, work.meeting.say_stage)


def _measure(work: _Work, nodes: list[list[int]]) -> dict[str, Any]:
    try:
        device = torch.device("cpu")
        if torch.cuda.is_available():
            from megasparse.training.distributed import device_of

            device = device_of(work.launch)
        deadline = Deadline(work.meeting.deadline.left(NETWORK))
        return measure(work.launch, work.meeting.another_connection(), nodes, device, deadline)
    except Exception as error:  # NCCL's, gloo's and the store's errors share no type
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}


def _gather(launch: Launch, meeting: Meeting, cfg: Config | None, options: Options) -> Gathered:
    arrivals = meeting.collect("arrived", ARRIVAL)
    facts = meeting.collect("facts", ANSWERS, arrivals)
    gathered = Gathered(
        world_size=launch.world_size,
        arrivals=arrivals,
        expected_hosts=expand_nodelist(os.environ.get("SLURM_STEP_NODELIST", "")),
        facts=facts,
        min_free=options.min_free,
    )
    gathered.stages = meeting.collect("stage", 0.0, sorted(set(arrivals) - set(facts)))
    by_node: dict[tuple[str, str], list[int]] = {}
    for rank, came in sorted(arrivals.items()):
        by_node.setdefault((came["host"], came["node"]), []).append(rank)
    gathered.nodes = list(by_node.values())
    if cfg is not None:
        gathered.checkpoint_bytes, gathered.checkpoints_kept = checkpoint_bytes(cfg), cfg.checkpoint.keep_last
    return gathered


def _decide_plan(meeting: Meeting, gathered: Gathered, cfg: Config | None) -> None:
    """Measure the network only where everyone is there with the same working libraries: else it would hang."""
    complete = len(gathered.facts) == gathered.world_size
    versions = {json.dumps(facts["versions"]) for facts in gathered.facts.values()}
    broken = any(check == "GPU" for facts in gathered.facts.values() for check, _ in facts["errors"])
    network = gathered.world_size > 1 and complete and len(versions) == 1 and "null" not in versions and not broken
    if cfg is not None and len(gathered.nodes) > 1:
        folder = existing_parent(cfg.checkpoint_directory)
        try:
            marker = folder / f".megasparse-preflight-{uuid.uuid4().hex[:12]}"
            marker.touch()
            gathered.marker = str(marker)
        except OSError:  # the storage check says so
            gathered.marker = ""
    plan = {"network": network, "nodes": gathered.nodes, "marker": gathered.marker}
    meeting.decide("the measurements", plan)


def _appears(path: Path) -> bool:
    end = time.monotonic() + SHARED_STORAGE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _conclude(meeting: Meeting, gathered: Gathered, plan: dict[str, Any], options: Options) -> int:
    present = sorted(gathered.facts)
    if plan["network"]:
        gathered.network = meeting.collect("network", NETWORK)
    gathered.clocks = meeting.collect("clock", NETWORK, present)
    if plan["marker"]:
        leaders = [ranks[0] for ranks in gathered.nodes if ranks[0] in gathered.facts]
        gathered.sees_marker = meeting.collect("sees", NETWORK, leaders)
        Path(plan["marker"]).unlink(missing_ok=True)
    findings = compare(gathered)
    failed = any(finding.status == "fail" for finding in findings)
    print_checks(list(findings), as_json=options.as_json)
    if failed and not options.as_json:
        print(f"pre-flight failed; hosts at fault: {', '.join(culprits(findings)) or 'none, the job itself'}")
    if options.report is not None:
        write_report(options.report, findings)
    meeting.decide("the verdict", int(failed))
    return int(failed)


def write_report(path: Path, findings: Sequence[Finding]) -> None:
    """JSON: {"ok": bool, "hosts": [hosts at fault], "checks": [...]}; replaces an older one in one move."""
    checks = [dataclasses.asdict(finding) for finding in findings]
    failed = any(finding.status == "fail" for finding in findings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"ok": not failed, "hosts": culprits(findings), "checks": checks})
