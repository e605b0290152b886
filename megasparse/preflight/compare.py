"""From everybody's answers to verdicts that name hosts and ranks. Pure functions of what was gathered."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megasparse.doctor import SHARED_MEMORY_PER_GPU, SLOW_SHARE, Check

SLOW_LINK, SLOWISH_LINK = 0.5, 0.8
"""Of the median node's bandwidth: below the first a node fails, below the second it is a warning."""
SLOW_GPU = 0.8
"""Of the median GPU's rate in a matrix product, below which a GPU fails."""
FREE_GPU_MEMORY = 0.9
"""Share of a GPU's memory that must be free: our own CUDA context takes about one percent."""
SKEW_WARNS, SKEW_FAILS = 2.0, 30.0
"""Seconds. Time limits, logs and checkpoints' ages are compared between hosts."""
_LONGEST_LIST = 6
GIB = 1 << 30


@dataclass(frozen=True)
class Finding(Check):
    """A check of the whole allocation; `ranks` are the culprits of a warning or failure ([]: the job as a whole)."""

    ranks: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()


@dataclass
class Gathered:
    """What rank 0 knows at the end. Dicts are by rank and hold those that answered."""

    world_size: int
    arrivals: dict[int, dict[str, Any]]
    expected_hosts: list[str] = field(default_factory=list)
    """Of the allocation, where the launcher names them."""
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    stages: dict[int, str] = field(default_factory=dict)
    """What ranks without facts, or without network results, were last at."""
    clocks: dict[int, float] = field(default_factory=dict)
    """Unix time at the same moment."""
    sees_marker: dict[int, bool] = field(default_factory=dict)
    """Whether first ranks of nodes see a file that rank 0 wrote beside the checkpoints."""
    marker: str = ""
    network: dict[int, dict[str, Any]] | None = None
    """None: not measured."""
    nodes: list[list[int]] = field(default_factory=list)
    checkpoint_bytes: int = 0
    checkpoints_kept: int = 0
    min_free: int = GIB


def compare(gathered: Gathered) -> list[Finding]:
    """All verdicts, in the order in which they should be read."""
    findings = [_arrival(gathered), *_silent(gathered), *_errors(gathered)]
    findings += [_same(gathered, *what) for what in _MUST_AGREE]
    findings += [*_storage(gathered), *_one_disk(gathered), *_clock(gathered), *_gpus(gathered), *_network(gathered)]
    return findings


def culprits(findings: Iterable[Finding]) -> list[str]:
    """Hosts that a failure names."""
    return sorted({host for finding in findings if finding.status == "fail" for host in finding.hosts})


def numbers(ranks: Iterable[int]) -> str:
    """`0-3,7`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ",".join("-".join(map(str, part)) for part in parts)


def where(gathered: Gathered, ranks: Iterable[int]) -> str:
    """`rank 3 on n2; ranks 8-15 on n4`."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(gathered.arrivals[rank]["host"], []).append(rank)
    texts = [f"rank{'s' if len(own) > 1 else ''} {numbers(own)} on {host}" for host, own in by_host.items()]
    more = len(texts) - _LONGEST_LIST
    return "; ".join(texts[:_LONGEST_LIST]) + (f"; and {more} more hosts" if more > 0 else "")


def _finding(
    gathered: Gathered, name: str, status: Any, found: str, ranks: Iterable[int] = (), cost: str = "", fix: str = ""
) -> Finding:
    ranks = tuple(sorted(ranks))
    hosts = tuple(sorted({gathered.arrivals[rank]["host"] for rank in ranks}))
    return Finding(name, status, found, cost, fix, ranks, hosts)


def _arrival(gathered: Gathered) -> Finding:
    came, world = gathered.arrivals, gathered.world_size
    hosts = {arrival["host"] for arrival in came.values()}
    missing = sorted(set(range(world)) - set(came))
    if not missing:
        return Finding("ranks", "ok", f"{world} of {world} on {len(hosts)} host{'s' if len(hosts) != 1 else ''}")
    plural = "s" if len(missing) > 1 else ""
    found = f"rank{plural} {numbers(missing)} of {world} never came; there are: {where(gathered, came)}"
    absent = [host for host in gathered.expected_hosts if host not in hosts]
    if absent:
        found += f". Hosts without any rank: {', '.join(absent)}"
    nodes = Counter((arrival["host"], arrival["node"]) for arrival in came.values())
    expected = {(arrival["host"], arrival["node"]): arrival["ranks_on_node"] for arrival in came.values()}
    short = sorted({node[0] for node, count in nodes.items() if count < expected[node]})
    if short:
        found += f". Hosts with too few ranks: {', '.join(short)}"
    fix = "read the missing ranks' own log; look at the host (dead, file system not mounted, another MASTER_PORT)"
    return Finding("ranks", "fail", found, fix=fix, ranks=tuple(missing), hosts=(*absent, *short))


def _silent(gathered: Gathered) -> Iterable[Finding]:
    stuck: dict[str, list[int]] = {}
    for rank in set(gathered.arrivals) - set(gathered.facts):
        stuck.setdefault(gathered.stages.get(rank, "starting"), []).append(rank)
    for stage, ranks in stuck.items():
        found = f"{where(gathered, ranks)}: came, then no answer while {stage}"
        yield _finding(gathered, "answers", "fail", found, ranks, fix="a slow or dead file system, or a dead GPU")


def _errors(gathered: Gathered) -> Iterable[Finding]:
    """The same message of several ranks is one row; of all ranks, it is nobody's own fault."""
    by_message: dict[tuple[str, str], list[int]] = {}
    for rank, facts in gathered.facts.items():
        for check, message in facts["errors"]:
            by_message.setdefault((check, message), []).append(rank)
    for (check, message), ranks in by_message.items():
        node_checks = check in ("data", "storage")
        able = [rank for rank, facts in gathered.facts.items() if not node_checks or _is_leader(gathered, rank)]
        everyone = len(gathered.facts) == gathered.world_size and len(ranks) == len(able)
        whose = "everywhere" if everyone else where(gathered, ranks)
        yield _finding(gathered, check, "fail", f"{whose}: {message}", () if everyone else ranks)


def _is_leader(gathered: Gathered, rank: int) -> bool:
    """Whether the rank is the first of its node."""
    own = gathered.arrivals[rank]
    return rank == min(
        other
        for other, arrival in gathered.arrivals.items()
        if (arrival["host"], arrival["node"]) == (own["host"], own["node"])
    )


_MUST_AGREE = (
    ("code", "code", "same package on every host: one shared checkout, or the same wheel"),
    ("config", "config", "same file, overrides and environment on every rank"),
    ("data files", "data", "copy the data again, or put it on shared storage"),
    ("versions", "versions", "one environment or container for all nodes"),
)


def _same(gathered: Gathered, name: str, key: str, fix: str) -> Finding:
    """Whether all ranks that looked saw the same; who differs from the most common answer, and in what."""
    answers = {rank: facts[key] for rank, facts in sorted(gathered.facts.items()) if facts.get(key) is not None}
    if not answers:
        return Finding(name, "warn", "nobody could look")
    texts = {rank: json.dumps(answer, sort_keys=True) for rank, answer in answers.items()}
    common_text = Counter(texts.values()).most_common(1)[0][0]  # of equally many, the lowest rank's
    common = json.loads(common_text)
    others: dict[str, list[int]] = {}
    for rank, text in texts.items():
        if text != common_text:
            others.setdefault(text, []).append(rank)
    if not others:
        return Finding(name, "ok", _summary(key, common, len(answers)))
    parts = [f"{where(gathered, ranks)}: {_difference(json.loads(text), common)}" for text, ranks in others.items()]
    found = f"{len(others) + 1} different among {len(answers)}; {'. '.join(parts[:_LONGEST_LIST])}"
    guilty = [rank for ranks in others.values() for rank in ranks]
    return _finding(gathered, name, "fail", found, guilty, "ranks would hang, or train something else", fix)


def _summary(key: str, answer: Mapping[str, Any], count: int) -> str:
    who = f"the same for {count}" if count > 1 else "seen by one"
    if key == "versions":
        return f"{who}: " + ", ".join(f"{name} {value}" for name, value in answer.items())
    if key == "data":
        size = sum(int(str(value).split()[0]) for value in answer.values())
        return f"{who} node{'s' if count > 1 else ''}: {len(answer)} files, {size / GIB:.2f} GiB"
    digest = hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()[:12]
    return f"{who}: {len(answer)} {'keys' if key == 'config' else 'files'}, {digest}"


def _difference(one: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    names = [name for name in {**common, **one} if one.get(name) != common.get(name)]
    texts = [f"{name} {one.get(name, 'absent')}, elsewhere {common.get(name, 'absent')}" for name in names[:3]]
    return "; ".join(texts) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _storage(gathered: Gathered) -> Iterable[Finding]:
    rows: dict[tuple[str, str, str], list[int]] = {}
    texts: dict[tuple[str, str, str], str] = {}
    fine: dict[str, float] = {}
    for rank, facts in gathered.facts.items():
        for folder in facts.get("storage") or ():
            names = " and ".join(folder["names"])
            status, text = _judge_folder(gathered, folder, "gpu" in facts, gathered.arrivals[rank]["ranks_on_node"])
            if status == "ok":
                label = f"{names} ({folder['path']})"
                fine[label] = min(folder["free"] / GIB, fine.get(label, float("inf")))
            else:
                kind = (names, status, folder.get("problem", ""))  # free bytes differ from moment to moment
                rows.setdefault(kind, []).append(rank)
                texts.setdefault(kind, text)
    if fine:
        listed = ", ".join(f"{label} {free:.1f} GiB" for label, free in fine.items())
        yield Finding("free space", "ok", f"least of any node: {listed}")
    leaders = sum("storage" in facts for facts in gathered.facts.values())
    for kind, ranks in rows.items():
        (names, status, _), text = kind, texts[kind]
        everyone = len(ranks) == leaders  # most likely the same, shared storage: nobody's own fault
        whose = "everywhere" if everyone else where(gathered, ranks)
        fix = "free space, or choose another directory (run.directory, checkpoint.directory, data.cache_dir)"
        yield _finding(gathered, names, status, f"{whose}: {text}", () if everyone else ranks, fix=fix)


def _judge_folder(gathered: Gathered, folder: Mapping[str, Any], has_gpu: bool, ranks: int) -> tuple[str, str]:
    path, free = folder["path"], folder["free"]
    has = f"{path} has {free / GIB:.1f} GiB free"
    if "problem" in folder:
        return "fail", f"cannot write to {path}: {folder['problem']}"
    if folder["names"] == ["shared memory"]:
        low = has_gpu and free < SHARED_MEMORY_PER_GPU * ranks
        return ("fail", f"{has}: NCCL and loader processes need about {ranks} GiB") if low else ("ok", "")
    needed, wanted = gathered.min_free, gathered.min_free
    if "checkpoints" in folder["names"]:
        size = gathered.checkpoint_bytes
        needed += size
        wanted += size * max(1, gathered.checkpoints_kept + 1 - folder["checkpoints"])
    if free < needed:
        return "fail", f"{has}, {needed / GIB:.1f} GiB are needed"
    if free < wanted:
        return "warn", f"{has}; the checkpoints that are kept will need {wanted / GIB:.1f} GiB"
    return "ok", ""


def _one_disk(gathered: Gathered) -> Iterable[Finding]:
    blind = [rank for rank, seen in gathered.sees_marker.items() if not seen]
    if blind:
        found = f"{where(gathered, blind)}: does not see what rank 0 writes in {gathered.marker}"
        fix = "checkpoint.directory must be on storage that all nodes share"
        yield _finding(gathered, "shared storage", "fail", found, blind, "checkpoints in pieces on every node", fix)
    elif len(gathered.sees_marker) > 1:
        yield Finding("shared storage", "ok", f"{len(gathered.sees_marker)} nodes see rank 0's file")


def _clock(gathered: Gathered) -> Iterable[Finding]:
    if len(gathered.clocks) < 2:
        return
    middle = statistics.median_low(gathered.clocks.values())
    skews = {rank: clock - middle for rank, clock in gathered.clocks.items()}
    worst = max(skews.values(), key=abs)
    off = [rank for rank, skew in skews.items() if abs(skew) > SKEW_WARNS]
    if not off:
        yield Finding("clocks", "ok", f"within {abs(worst):.2f} s")
        return
    found = f"{where(gathered, off)}: up to {worst:+.1f} s from the median"
    status = "fail" if abs(worst) > SKEW_FAILS else "warn"
    yield _finding(gathered, "clocks", status, found, off, "time limits and logs disagree", "chrony or ntpd")


def _gpus(gathered: Gathered) -> Iterable[Finding]:
    gpus = {rank: facts["gpu"] for rank, facts in gathered.facts.items() if facts.get("gpu")}
    if not gpus:
        return
    from megasparse.monitoring.throughput import peak_bf16_flops

    median = statistics.median(gpu["rate"] for gpu in gpus.values())
    problems: dict[tuple[str, str, str], list[int]] = {}
    for rank, gpu in gpus.items():
        for status, text, fix in _judge_gpu(gpu, median, peak_bf16_flops(gpu["name"])):
            problems.setdefault((status, text, fix), []).append(rank)
    names = Counter(gpu["name"] for gpu in gpus.values())
    found = ", ".join(f"{count} x {name}" for name, count in names.items()) + f", median {median / 1e12:.0f} TFLOP/s"
    yield Finding("GPUs", "ok" if len(names) == 1 else "warn", found)
    for (status, text, fix), ranks in problems.items():
        yield _finding(gathered, "GPU", status, f"{where(gathered, ranks)}: {text}", ranks, fix=fix)


def _judge_gpu(gpu: Mapping[str, Any], median: float, peak: float | None) -> Iterable[tuple[str, str, str]]:
    if gpu["free"] < FREE_GPU_MEMORY * gpu["total"]:
        text = f"{(gpu['total'] - gpu['free']) / GIB:.1f} of {gpu['total'] / GIB:.0f} GiB in use by other processes"
        yield "fail", text, "end leftovers of earlier jobs (nvidia-smi)"
    if not gpu["repeats"]:
        yield "fail", "a matrix product does not repeat bit by bit", "the GPU is defective: take the node out"
    if gpu.get("uncorrected"):
        yield "fail", f"{gpu['uncorrected']} uncorrected memory errors", "reset the GPU or reboot the node"
    if gpu.get("remap_failed"):
        yield "fail", "defective memory rows could not be remapped", "the GPU must be replaced: take the node out"
    rate = f"{gpu['rate'] / 1e12:.0f} TFLOP/s in a bf16 product"
    advice = "look for other processes, power caps and heat (nvidia-smi -q -d PERFORMANCE)"
    if gpu["rate"] < SLOW_GPU * median:
        yield "fail", f"{rate}, the median is {median / 1e12:.0f}", advice
    elif peak is not None and gpu["rate"] < SLOW_SHARE * peak:
        yield "warn", f"{rate}, {gpu['rate'] / peak:.0%} of its peak", advice


def _network(gathered: Gathered) -> Iterable[Finding]:
    if gathered.network is None:
        if gathered.world_size > 1:
            yield Finding("network", "warn", "not measured, because of the failures above")
        return
    fix = "NCCL_DEBUG=INFO (gloo: GLOO_SOCKET_IFNAME) says which interface is used; look at firewall and cables"
    silent = sorted(set(range(gathered.world_size)) - set(gathered.network))
    failed = {rank: result["error"] for rank, result in gathered.network.items() if "error" in result}
    if silent or failed:
        text = f"no answer from {where(gathered, silent)}. " if silent else ""
        by_error: dict[str, list[int]] = {}
        for rank, error in failed.items():
            by_error.setdefault(error, []).append(rank)
        text += ". ".join(f"{where(gathered, ranks)}: {error}" for error, ranks in list(by_error.items())[:3])
        everyone = len(failed) == gathered.world_size
        guilty = silent or (() if everyone else tuple(failed))  # who waits for a lost rank fails as well
        ranks = () if len(guilty) == gathered.world_size else guilty
        yield _finding(gathered, "all-reduce", "fail", text.strip(), ranks, "the run would hang at its start", fix)
        return
    results = gathered.network
    wrong = [rank for rank, result in results.items() if not result["correct"]]
    if wrong:
        yield _finding(gathered, "all-reduce", "fail", f"{where(gathered, wrong)}: a wrong sum", wrong, fix=fix)
    first = results[0]
    rate = min(result["all_reduce"] for result in results.values())
    size = f"{first['bytes'] >> 20} MiB over {gathered.world_size} ranks ({first['backend']})"
    yield Finding("all-reduce", "ok", f"{size}: {rate / 1e9:.2f} GB/s bus bandwidth")
    yield from _links(gathered, results, fix)


def _links(gathered: Gathered, results: Mapping[int, Mapping[str, Any]], fix: str) -> Iterable[Finding]:
    """A node is as fast as its better link: its neighbours have one good link left."""
    rates: dict[int, float] = {}
    for index, ranks in enumerate(gathered.nodes):
        links = [sum(results[rank]["links"].get(other, 0.0) for rank in ranks)
                 for other in {name for rank in ranks for name in results[rank]["links"]}]  # fmt: skip
        if links:
            rates[index] = max(links)
    if not rates:
        return
    median = statistics.median(rates.values())
    found = f"median node {median / 1e9:.2f} GB/s, slowest {min(rates.values()) / 1e9:.2f} GB/s, both ways together"
    yield Finding("links between nodes", "ok", found)
    for index, rate in rates.items():
        if rate < SLOWISH_LINK * median:
            ranks = gathered.nodes[index]
            text = f"{where(gathered, ranks)}: {rate / 1e9:.2f} GB/s, {rate / median:.0%} of the median node"
            # Over gloo the rate is that of busy CPUs more than that of the network: no reason to stop a job.
            status = "fail" if rate < SLOW_LINK * median and results[0]["backend"] == "nccl" else "warn"
            yield _finding(gathered, "slow node", status, text, ranks, "every step waits for it", fix)
