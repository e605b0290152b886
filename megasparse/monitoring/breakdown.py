"""Where the time of a training step goes, by part of the model: a profiler trace, attributed.

`name_parts` puts a range around every module's forward. A kernel belongs to the innermost range in which it was
launched. The backward has no ranges of its own: autograd tells, by the sequence number of the node that it runs, which
forward operation the node is of, and that one lies in a range. Whatever a library calls its kernels plays no role.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "part: "
EMBEDDING, ATTENTION, MLP, NORMS = (PREFIX + name for name in ("embedding", "attention", "MLP", "norms"))
RESIDUAL, HEAD = PREFIX + "residual", PREFIX + "head and loss"
GRADIENTS, OPTIMIZER = PREFIX + "gradients", PREFIX + "optimizer"
"""Gradients: zeroing them, adding what autograd returns to the fp32 buffers."""
PARTS = (EMBEDDING, ATTENTION, MLP, NORMS, RESIDUAL, HEAD, GRADIENTS, OPTIMIZER)
COMMUNICATION, OTHER = "communication", "other"
_NODE = "autograd::engine::evaluate_function: "
_BY_ATTRIBUTE = {
    "embedding": EMBEDDING,
    "decoder": RESIDUAL,
    "final_layernorm": NORMS,
    "self_attention": ATTENTION,
    "attention_graphs": ATTENTION,
    "mlp": MLP,
    "input_layernorm": NORMS,
    "pre_mlp_layernorm": NORMS,
}
"""Attributes of GPTModel, TransformerBlock and TransformerLayer -> part. A norm that Transformer Engine fuses into a
projection counts with the projection, a CUDA graph of the attention part as a whole; what GPTModel does beside its
modules is the head's and the loss's."""


@dataclass
class Breakdown:
    """Seconds of device time of the traced steps."""

    parts: dict[str, float] = field(default_factory=dict)
    """By part, without the prefix; `communication` (all NCCL kernels) and `other` among them. On several streams
    kernels may run at the same time: then the parts add up to more than `busy`."""
    busy: float = 0.0
    """At least one kernel, copy or fill was running."""
    idle: float = 0.0
    """From the first kernel to the last, nothing was running."""
    communication: float = 0.0
    """At least one NCCL kernel was running. One that waits for another rank runs: a pipeline's bubble counts here."""
    exposed: float = 0.0
    """The part of `communication` during which nothing else was running: what a step would gain without it."""
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    """By part: seconds of every kernel by name."""


@contextmanager
def name_parts(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Ranges around the modules of GPTModel chunks (wrapped or not) while the block runs."""
    handles = []
    for chunk in chunks:
        for module in chunk.modules():
            if any(kind.__name__ == "GPTModel" for kind in type(module).__mro__):
                handles += _range_around(module, HEAD)
            for name, child in module.named_children():
                if name in _BY_ATTRIBUTE:
                    handles += _range_around(child, _BY_ATTRIBUTE[name])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _range_around(module: nn.Module, name: str) -> list[Any]:
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def profile_step(chunks: Sequence[nn.Module], step: Callable[[], Any]) -> Breakdown:
    """Profiles one call of `step`. Without CUDA the time is that of PyTorch's operators on the CPU."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with name_parts(chunks), profile(activities=activities) as profiler:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return attribute_time(json.loads(path.read_text())["traceEvents"])


def attribute_time(events: Sequence[dict[str, Any]]) -> Breakdown:
    """A Chrome trace as PyTorch's profiler writes it -> `Breakdown`. Times in it are microseconds."""
    complete = [event for event in events if event.get("ph") == "X"]
    host: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in complete:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            host[event["tid"]].append(event)
    owners = _Owners(host)
    work = [event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if work:
        launches = {
            event["args"]["correlation"]: owners.of[id(event)]
            for thread in host.values()
            for event in thread
            if event["cat"].startswith("cuda_") and "correlation" in event.get("args", {})
        }
        items = [(event, launches.get(event["args"].get("correlation"), OTHER), event["dur"]) for event in work]
    else:
        work = [event for thread in host.values() for event in thread if event["cat"] == "cpu_op"]
        items = [(event, owners.of[id(event)], owners.own_time[id(event)]) for event in work]
    result = Breakdown()
    parts: dict[str, float] = defaultdict(float)
    kernels: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event, owner, duration in items:
        name = COMMUNICATION if _communicates(event) else owner.removeprefix(PREFIX)
        parts[name] += duration / 1e6
        kernels[name][event["name"]] += duration / 1e6
    names = [part.removeprefix(PREFIX) for part in PARTS] + [COMMUNICATION, OTHER]
    result.parts = {name: parts.get(name, 0.0) for name in names}
    result.kernels = {name: dict(sorted(rows.items(), key=lambda row: -row[1])) for name, rows in kernels.items()}
    result.busy, span = _union(work)
    result.idle = span - result.busy
    result.communication, _ = _union([event for event in work if _communicates(event)])
    computing, _ = _union([event for event in work if not _communicates(event)])
    result.exposed = result.busy - computing
    return result


def _communicates(event: dict[str, Any]) -> bool:
    return "nccl" in event["name"].lower()


def _union(events: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(seconds covered, seconds from first start to last end) of a trace's events."""
    if not events:
        return 0.0, 0.0
    intervals = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    covered, end = 0.0, intervals[0][0]
    for start, stop in intervals:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered / 1e6, (end - intervals[0][0]) / 1e6


def _nested(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each event of a thread, in order of time, with the events around it, outermost first."""
    stack: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        yield event, stack
        stack.append(event)


class _Owners:
    """Which part each host event belongs to, and how long it ran outside events nested in it."""

    def __init__(self, threads: dict[Any, list[dict[str, Any]]]) -> None:
        self.of: dict[int, str] = {}
        self.own_time: dict[int, float] = {}
        # Sequence numbers count per thread. A later operation with the same number is the one that made the node:
        # operations that make none carry the number of the next.
        self._nodes: dict[Any, dict[int, str]] = {}
        for thread, events in threads.items():
            self._nodes[thread] = {}
            for event, around in _nested(events):
                self._learn(event, around, self._nodes[thread])
        forward = max(self._nodes, key=lambda thread: len(self._nodes[thread]), default=None)
        main = min((self._forward_thread(event) for e in threads.values() for event in e), default=0.0)
        for thread, events in threads.items():
            for event, around in _nested(events):
                self.of[id(event)] = self._owner([*around, event], thread, forward, main)
                self.own_time[id(event)] = event["dur"]
                operators = [outer for outer in around if outer["cat"] == "cpu_op"]
                if operators and event["cat"] == "cpu_op":
                    self.own_time[id(operators[-1])] -= event["dur"]

    @staticmethod
    def _forward_thread(event: dict[str, Any]) -> float:
        """The profiler's number of the thread whose forward a backward node is of; 0 stands for none."""
        return float(event.get("args", {}).get("Fwd thread id") or "inf")

    @staticmethod
    def _learn(event: dict[str, Any], stack: list[dict[str, Any]], nodes: dict[int, str]) -> None:
        number = event.get("args", {}).get("Sequence number")
        if number is None or event["name"].startswith(_NODE):
            return
        for outer in reversed(stack):
            if outer["name"].startswith(_NODE):
                return
            if outer["name"].startswith(PREFIX):
                nodes[number] = outer["name"]
                return

    def _owner(self, stack: list[dict[str, Any]], thread: Any, forward: Any, main: float) -> str:
        for event in reversed(stack):
            if event["name"].startswith(PREFIX):
                return str(event["name"])
            if event["name"].startswith(_NODE):
                number = event.get("args", {}).get("Sequence number")
                if number is None:  # AccumulateGrad belongs to no operation
                    return GRADIENTS
                # Nodes of a recomputed forward have been made on the thread of the backward.
                known = self._nodes[forward if self._forward_thread(event) == main else thread]
                if number in known:
                    return known[number]
        return OTHER
