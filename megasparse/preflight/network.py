"""What the ranks measure together: an all-reduce over all of them, and the links between neighbouring nodes.

An all-reduce runs at the pace of its slowest link and names nobody. So nodes also exchange data in pairs, each with
its neighbours in a ring; a node whose every link is slow is the slow one.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megasparse.preflight.meeting import Deadline
from megasparse.training.launch_environment import Launch

GPU_BYTES, CPU_BYTES = 256 << 20, 4 << 20
REPEATS = 5


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Links of a ring of nodes, in rounds in which each node has at most one partner.

    >>> rounds(5)
    [[(0, 1), (2, 3)], [(1, 2), (3, 4)], [(4, 0)]]
    """
    links = [(node, node + 1) for node in range(nodes - 1)]
    result = [links[0::2], links[1::2]]
    if nodes > 2:
        closing = (nodes - 1, 0)
        if nodes % 2:
            result.append([closing])
        else:
            result[1].append(closing)
    return [links for links in result if links]


def measure(
    launch: Launch, store: dist.Store, nodes: list[list[int]], device: torch.device, deadline: Deadline
) -> dict[str, Any]:
    """Join all ranks, all-reduce, exchange with neighbours, leave. Collective; may hang where a network does.

    Args:
        nodes: the ranks of every node.

    Returns:
        backend; all_reduce: bus bandwidth in bytes/s (2 (n-1)/n of the payload over the time, as NCCL's tests count);
        correct: whether every element of the sum was right; links: {other node: bytes/s, both directions together}.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=deadline.left()),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        payload = torch.empty((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
        result = {"backend": backend, **_all_reduce(launch, payload), "links": _links(launch, payload, nodes)}
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


def _seconds(payload: torch.Tensor, action: Any) -> float:
    """Shortest of some calls, after one to warm up; all ranks call."""
    times = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        _synchronize(payload)
        started = time.perf_counter()
        action()
        _synchronize(payload)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _synchronize(payload: torch.Tensor) -> None:
    if payload.is_cuda:
        torch.cuda.synchronize(payload.device)


def _all_reduce(launch: Launch, payload: torch.Tensor) -> dict[str, Any]:
    world = launch.world_size
    payload.fill_(launch.rank + 1)
    dist.all_reduce(payload)
    correct = bool((payload == world * (world + 1) // 2).all())
    payload.fill_(1.0)
    seconds = _seconds(payload, lambda: dist.all_reduce(payload))
    return {"all_reduce": 2 * (world - 1) / world * payload.nbytes / seconds, "bytes": payload.nbytes,
            "correct": correct}  # fmt: skip


def _links(launch: Launch, payload: torch.Tensor, nodes: list[list[int]]) -> dict[str, float]:
    """Every rank of a node exchanges with the rank at its place in the other node, so all network cards work."""
    mine = next(index for index, ranks in enumerate(nodes) if launch.rank in ranks)
    place = nodes[mine].index(launch.rank)
    received = torch.empty_like(payload)
    links: dict[str, float] = {}
    for links_of_round in rounds(len(nodes)):
        pairs = dict(links_of_round) | {b: a for a, b in links_of_round}
        other = pairs.get(mine)
        partner = nodes[other][place] if other is not None and place < len(nodes[other]) else None

        def exchange(partner: int | None = partner) -> None:
            if partner is None:
                return
            pair = [dist.P2POp(dist.isend, payload, partner), dist.P2POp(dist.irecv, received, partner)]
            for work in dist.batch_isend_irecv(pair):
                work.wait()

        seconds = _seconds(payload, exchange)
        if partner is not None:
            links[str(other)] = 2 * payload.nbytes / seconds
    return links
