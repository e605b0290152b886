"""The pre-flight check: real processes as nodes of a job on gloo, and the verdicts on what a cluster may show."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import yaml

import megasparse
from megasparse.config import parse_config
from megasparse.preflight.compare import GIB, Gathered, compare, culprits, numbers
from megasparse.preflight.facts import storage
from megasparse.preflight.network import rounds
from tests.commands import Commands
from tests.launch import free_port
from tests.training.cases import configuration, write_data, write_tokenizer

LEAVING = 5.0
"""Seconds for which rank 0 keeps the store open to those who may still come."""


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What srun sets for the task on node `rank`, n0 and so on, of a job of one task a node."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank), "SLURM_STEP_TASKS_PER_NODE": f"1(x{world})", "SLURMD_NODENAME": f"n{rank}",
        "SLURM_STEP_NODELIST": f"n[0-{world - 1}]", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "COLUMNS": "200",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`config.yaml` and its data, named relative to the working directory."""
    make_case(tmp_path)
    return tmp_path


def make_case(folder: Path, seed: int = 0) -> None:
    write_data(folder / "data", 40, seed)
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    sections = {"data": {"tokenizer": Path(tokenizer).name}, "training": {"global_batch_size": 12}}
    config = configuration(Path("run"), "data", **sections)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def ranks(folder: Path, world: int = 2, *arguments: str) -> list[dict[str, Any]]:
    """Ranks that all do the right thing; tests change one of them."""
    port = free_port()
    command = ["preflight", "config.yaml", "--report", str(folder / "report.json"), *arguments]
    return [
        {"cwd": str(folder), "env": environment(rank, world, port), "arguments": list(command)} for rank in range(world)
    ]


@pytest.fixture(scope="module")
def pace(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that a check takes on this machine, as busy as it is, where all is in order."""
    folder = tmp_path_factory.mktemp("pace")
    make_case(folder)
    commands("--version")  # its imports are not part of it
    started = time.monotonic()
    assert [code for code, _ in commands.job(ranks(folder, 3))] == [0, 0, 0]
    return time.monotonic() - started


def limit(pace: float) -> float:
    """Of a check in which some ranks must be able to come and to answer: half of it, three quarters (seconds)."""
    return max(6.0, 8 * pace)


def failed(folder: Path) -> tuple[dict[str, str], list[str]]:
    """What the report says: the failures by their check, and the hosts at fault."""
    report = json.loads((folder / "report.json").read_text())
    failures = {check["name"]: check["found"] for check in report["checks"] if check["status"] == "fail"}
    assert report["ok"] == (not failures)
    return failures, report["hosts"]


def test_all_in_order(commands: Commands, folder: Path) -> None:
    before = set(os.listdir(folder))
    results = commands.job(ranks(folder, 3))
    assert [code for code, _ in results] == [0, 0, 0], results
    assert [text for _, text in results[1:]] == ["", ""], "rank 0 alone speaks"
    assert failed(folder) == ({}, [])
    assert re.search("│ ok +│ config ", results[0][1])
    written = json.loads((folder / "report.json").read_text())
    found = {check["name"]: check for check in written["checks"]}
    assert found["ranks"]["found"] == "3 of 3 on 3 hosts"
    found.pop("slow node", None)  # a warning that the processes of a busy test machine may earn
    assert set(found) == {
        "ranks", "code", "config", "data files", "versions", "free space", "shared storage", "clocks", "all-reduce",
        "links between nodes",
    }  # fmt: skip
    assert float(re.findall(r"([\d.]+) GB/s", found["all-reduce"]["found"])[0]) > 0.001
    assert "4 MiB over 3 ranks (gloo)" in found["all-reduce"]["found"]
    assert set(os.listdir(folder)) - before == {"report.json"}, "nothing else is left behind"


def test_another_config_on_one_rank(commands: Commands, folder: Path) -> None:
    job_ranks = ranks(folder, 3)
    job_ranks[1]["arguments"].append("training.seed=7")
    results = commands.job(job_ranks)
    assert [code for code, _ in results] == [1, 1, 1]
    assert failed(folder) == (
        {"config": "2 different among 3; rank 1 on n1: training.seed 7, elsewhere 1234"},
        ["n1"],
    )
    assert "│ FAIL │ config " in results[0][1]
    assert results[0][1].endswith("pre-flight failed; hosts at fault: n1\n")


def test_other_data_on_one_node(commands: Commands, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Another node's working directory is its own: other data of the same name, and its own checkpoints."""
    other = tmp_path_factory.mktemp("other")
    make_case(other, seed=1)
    job_ranks = ranks(folder)
    job_ranks[1]["cwd"] = str(other)
    assert commands.job(job_ranks)[0][0] == 1
    failures, hosts = failed(folder)
    assert (set(failures), hosts) == ({"data files"}, ["n1"])
    assert re.match(r"2 different among 2; rank 1 on n1: data.bin \d+ \w+, elsewhere \d+ \w+;", failures["data files"])
    (other / "data.idx").unlink()
    assert commands.job(job_ranks)[0][0] == 1
    failures, hosts = failed(folder)
    assert (set(failures), hosts) == ({"data", "data files"}, ["n1"])
    assert failures["data"].startswith("rank 1 on n1: data.blend = 'data': no file data.idx")


def test_another_code_version_on_one_node(
    commands: Commands, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("code")
    root = Path(megasparse.__file__).parent
    shutil.copytree(root, copy / "megasparse", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "megasparse" / "plan.py").open("a") as file:
        file.write("# newer\n")
    job_ranks = ranks(folder)
    job_ranks[1]["code"] = str(copy)
    assert commands.job(job_ranks)[0][0] == 1
    failures, hosts = failed(folder)
    assert (set(failures), hosts) == ({"code"}, ["n1"])
    assert re.fullmatch(r"2 different among 2; rank 1 on n1: plan.py \w+, elsewhere \w+", failures["code"])


def test_rank_that_never_comes(commands: Commands, folder: Path, pace: float) -> None:
    started = time.monotonic()
    results = commands.job(ranks(folder, 3, "--timeout", str(limit(pace)))[:2])
    assert time.monotonic() - started < 1.5 * limit(pace) + LEAVING + 3 * pace
    assert [code for code, _ in results] == [1, 1]
    assert failed(folder) == (
        {"ranks": "rank 2 of 3 never came; there are: rank 0 on n0; rank 1 on n1. Hosts without any rank: n2"},
        ["n2"],
    )


def test_first_rank_never_comes(commands: Commands, folder: Path, pace: float) -> None:
    started = time.monotonic()
    ((code, text),) = commands.job(ranks(folder, 2, "--timeout", str(limit(pace)))[1:])
    assert time.monotonic() - started < 1.5 * limit(pace) + LEAVING + 3 * pace
    assert code == 1
    assert "rank 1 of 2 (local rank 0 on " in text
    assert "rank 0 does not answer at 127.0.0.1:" in text


def test_rank_that_hangs_in_a_dead_file_system(commands: Commands, folder: Path, pace: float) -> None:
    """Reading a pipe that nobody writes to hangs, as a dead mount does."""
    os.mkfifo(folder / "pipe.yaml")
    job_ranks = ranks(folder, 2, "--timeout", str(limit(pace)))
    job_ranks[1]["arguments"][1] = "pipe.yaml"
    results = commands.job(job_ranks)
    assert [code for code, _ in results] == [1, 1]
    assert failed(folder) == ({"answers": "rank 1 on n1: came, then no answer while reading the config"}, ["n1"])


def test_disk_that_cannot_hold_a_checkpoint(commands: Commands, folder: Path) -> None:
    wide = ["model.hidden_size=131072", "model.ffn_hidden_size=1048576", "model.num_layers=512"]
    assert commands.job(ranks(folder, 2, *wide))[0][0] == 1
    failures, hosts = failed(folder)
    assert (set(failures), hosts) == ({"checkpoints and run and cache"}, []), "it is the job's own fault"
    free = shutil.disk_usage(folder).free / GIB
    found = re.match(r"everywhere: \S+ has ([\d.]+) GiB free, ([\d.]+) GiB are needed", next(iter(failures.values())))
    assert found
    assert float(found[1]) == pytest.approx(free, rel=0.05)
    parameters = 512 * 3 * 131072 * 1048576
    assert float(found[2]) > parameters * 12 / GIB


def test_room_that_the_start_will_make_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of a save leaves most of a checkpoint, which the next start removes."""
    cfg = parse_config(configuration(tmp_path / "run", "data"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    left = cfg.checkpoint_directory / ".step_00000004.partial-0"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"x" * (1 << 20))
    written = (left / "__0_0.distcp").stat().st_blocks * 512
    assert {name: folder["free"] for folder in storage(cfg) for name in folder["names"]} == {
        "checkpoints": 1000 + written, "run": 1000 + written, "cache": 1000 + written, "shared memory": 1000,
    }  # fmt: skip


def test_directory_that_cannot_be_written(
    commands: Commands, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On one node the cache directory is the proc file system, where nobody can write."""
    job_ranks = ranks(folder, 2, "data.cache_dir=$CACHE")
    job_ranks[0]["env"]["CACHE"] = str(tmp_path_factory.mktemp("cache"))
    job_ranks[1]["env"]["CACHE"] = "/proc/self"
    assert commands.job(job_ranks)[0][0] == 1
    failures, hosts = failed(folder)
    assert (set(failures), hosts) == ({"cache"}, ["n1"])
    assert failures["cache"].startswith("rank 1 on n1: cannot write to /proc/")


def test_under_torchrun_agents_keep_the_store(commands: Commands, folder: Path) -> None:
    """torchrun's agent has a store open at the address that it gives to the ranks."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job_ranks = ranks(folder)
    for rank, spec in enumerate(job_ranks):
        spec["env"] = {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
    results = commands.job(job_ranks)
    assert [code for code, _ in results] == [0, 0], results
    assert "2 of 2 on 1 host " in results[0][1]
    assert "links between nodes" not in results[0][1], "they are on one node"


def test_alone_and_mistakes_of_the_config(commands: Commands, folder: Path) -> None:
    alone = {"cwd": str(folder), "env": {}, "arguments": ["preflight", "config.yaml", "--json"]}
    ((code, text),) = commands.job([alone])
    assert code == 0, text
    assert json.loads(text)[0]["found"] == "1 of 1 on 1 host"
    results = commands.job(ranks(folder, 2, "training.stepz=1"))
    assert [code for code, _ in results] == [1, 1]
    failures, hosts = failed(folder)
    assert hosts == []
    assert failures["config"].startswith("everywhere: override training.stepz=1: training.stepz: unknown key")
    assert "hosts at fault: none, the job itself" in results[0][1]


def cluster(nodes: int = 4, per_node: int = 2) -> Gathered:
    """Answers of a healthy cluster of GPU nodes."""
    world = nodes * per_node
    gathered = Gathered(world, {}, nodes=[])
    gathered.network = {}
    for rank in range(world):
        node = rank // per_node
        gathered.arrivals[rank] = {"host": f"n{node}", "node": str(node), "ranks_on_node": per_node}
        gpu = {
            "name": "NVIDIA H100 80GB HBM3", "free": 78 * GIB, "total": 80 * GIB, "rate": 700e12, "repeats": True,
            "uncorrected": 0, "remap_failed": False,
        }  # fmt: skip
        gathered.facts[rank] = {"errors": [], "code": {"a.py": "0"}, "config": {"x": 1}, "versions": {"torch": "2"},
                                "gpu": gpu}  # fmt: skip
        gathered.clocks[rank] = 1e9
        gathered.network[rank] = {"backend": "nccl", "all_reduce": 300e9, "bytes": 1 << 28, "correct": True,
                                  "links": {}}  # fmt: skip
    gathered.nodes = [list(range(node * per_node, (node + 1) * per_node)) for node in range(nodes)]
    for links in rounds(nodes):
        for one, other in links:
            for mine, theirs in ((one, other), (other, one)):
                for rank in gathered.nodes[mine]:
                    gathered.network[rank]["links"][str(theirs)] = 40e9
    return gathered


def failures(gathered: Gathered) -> list[tuple[str, tuple[str, ...], str]]:
    return [(f.name, f.hosts, f.found) for f in compare(gathered) if f.status == "fail"]


def test_healthy_cluster_has_no_failures() -> None:
    assert failures(cluster()) == []
    assert not [finding for finding in compare(cluster()) if finding.status == "warn" and finding.ranks]


def test_slow_node_is_named_and_its_neighbours_are_not() -> None:
    gathered = cluster(5)
    assert gathered.network is not None
    for rank, result in gathered.network.items():
        for other in result["links"]:
            if rank in gathered.nodes[2] or other == "2":
                result["links"][other] = 6e9
    ((name, hosts, found),) = failures(gathered)
    assert (name, hosts) == ("slow node", ("n2",))
    assert found == "ranks 4-5 on n2: 12.00 GB/s, 15% of the median node"
    assert culprits(compare(gathered)) == ["n2"]


def test_gpu_troubles_are_named() -> None:
    gathered = cluster()
    gathered.facts[3]["gpu"]["rate"] = 400e12
    gathered.facts[4]["gpu"]["free"] = 60 * GIB
    gathered.facts[5]["gpu"]["repeats"] = False
    gathered.facts[7]["gpu"]["uncorrected"] = 2
    assert [found for _, _, found in failures(gathered)] == [
        "rank 3 on n1: 400 TFLOP/s in a bf16 product, the median is 700",
        "rank 4 on n2: 20.0 of 80 GiB in use by other processes",
        "rank 5 on n2: a matrix product does not repeat bit by bit",
        "rank 7 on n3: 2 uncorrected memory errors",
    ]


def test_versions_clocks_shared_storage_and_sums() -> None:
    gathered = cluster()
    assert gathered.network is not None
    for rank in gathered.nodes[1]:
        gathered.facts[rank]["versions"] = {"torch": "3"}
        gathered.clocks[rank] += 120
    gathered.sees_marker = {0: True, 2: True, 4: False, 6: True}
    gathered.marker = "/runs/marker"
    gathered.network[6]["correct"] = False
    assert [(name, hosts) for name, hosts, _ in failures(gathered)] == [
        ("versions", ("n1",)), ("shared storage", ("n2",)), ("clocks", ("n1",)), ("all-reduce", ("n3",)),
    ]  # fmt: skip
    assert any("ranks 2-3 on n1: torch 3, elsewhere 2" in found for _, _, found in failures(gathered))


def test_rank_lost_in_a_collective_is_named() -> None:
    gathered = cluster()
    assert gathered.network is not None
    del gathered.network[5]
    for result in gathered.network.values():
        result["error"] = "timed out"
    ((name, hosts, found),) = failures(gathered)
    assert (name, hosts) == ("all-reduce", ("n2",))
    assert found.startswith("no answer from rank 5 on n2. ranks 0-1 on n0; ranks 2-3 on n1; rank 4 on n2;")


@pytest.mark.parametrize("nodes", range(1, 10))
def test_rounds_of_links(nodes: int) -> None:
    """Every neighbour of the ring meets once, and nobody is in two places in a round."""
    met = [frozenset(link) for links in rounds(nodes) for link in links]
    ring = {frozenset((node, (node + 1) % nodes)) for node in range(nodes)} if nodes > 1 else set()
    assert set(met) == ring
    assert len(met) == len(ring)
    for links in rounds(nodes):
        present = [node for link in links for node in link]
        assert len(present) == len(set(present))


def test_numbers() -> None:
    assert numbers([7, 1, 0, 2, 9, 10]) == "0-2,7,9-10"
