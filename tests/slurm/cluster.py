"""A SLURM cluster of seven nodes on this machine, for as long as a test session: munged, slurmctld, seven slurmd.

Nothing is installed and no daemon of the machine is touched: everything lives in a temporary directory and on free
ports. Needs root (slurmd starts jobs as their owner) and Debian's packages `slurm-wlm` and `munge`.

Partitions: `all` (n1 to n3); `frail` (n4 to n6), where tests may end a node; `spare` (n7), whose jobs those of `urgent`
preempt.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2", "n3", "n4", "n5", "n6", "n7")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

CONFIGURATION = """
ClusterName=megasparse-test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=5
SlurmdTimeout=15
SlurmctldTimeout=60
InactiveLimit=0
MinJobAge=600
ReturnToService=2
MessageTimeout=10
PropagateResourceLimits=NONE
{nodes}
PartitionName=DEFAULT MaxTime=60 State=UP OverSubscribe=NO PreemptMode=OFF
PartitionName=all Nodes=n[1-3] Default=YES
PartitionName=frail Nodes=n[4-6]
PartitionName=spare Nodes=n7 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=n7 PriorityTier=10
"""


def why_not() -> str | None:
    """Why SLURM cannot run here, or None."""
    missing = [name for name in PROGRAMS if program(name) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} missing; see tools/install_slurm.sh)"
    if os.geteuid() != 0:
        return "the SLURM daemons need root to start jobs"
    return None


def program(name: str) -> str | None:
    """Path of a program; daemons are in sbin, which is not in everybody's PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def wait_for(what: str, condition: Callable[[], Any], seconds: float, evidence: Callable[[], str] = str) -> Any:
    """The first truthy value of `condition()`; AssertionError with `evidence()` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s\n{evidence()}")
        time.sleep(0.25)


class Cluster:
    """Starts with `start`, ends with `stop`. `run` is for SLURM's own commands."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="megasparse-slurm-"))
        self.root.chmod(0o755)  # munged refuses a socket where others could not reach it
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._hastener = threading.Thread(target=self._hasten, daemon=True)
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_", "WANDB_"))
            },
            "SLURM_CONF": str(self.root / "slurm.conf"),
        }

    def start(self) -> None:
        """Returns when all nodes take jobs."""
        (self.root / "state").mkdir()
        ports = dict(zip(NODES, (free_port() for _ in NODES), strict=True))
        for node in NODES:
            (self.root / f"spool-{node}").mkdir()
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=localhost Port={port} CPUs=16 RealMemory=4000"
            for node, port in ports.items()
        ]
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(root=self.root, controller_port=free_port(), nodes="\n".join(lines))
        )
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o600)
        self._spawn(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.root}/munge.socket",
            f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/munged.log",
            f"--seed-file={self.root}/munged.seed", "--num-threads=2",
        )  # fmt: skip
        wait_for("munged", (self.root / "munge.socket").exists, 10, self.logs)
        self._spawn("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_for("idle nodes", lambda: self.idle_nodes() == set(NODES), 60, self.logs)
        self._hastener.start()

    def _hasten(self) -> None:
        """Requeued jobs start again at once, with time to finish: SLURM alone makes them wait for two minutes."""
        while not self._stopping.wait(0.5):
            waiting = self.run("squeue", "--noheader", "--states=PENDING", "--format=%i|%r", check=False)
            for line in waiting.splitlines():
                job, _, reason = line.partition("|")
                if reason == "BeginTime":
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60", check=False)

    def start_node(self, node: str) -> None:
        """Starts the slurmd of a node, again where it was killed."""
        self._spawn("slurmd", "-D", "-N", node, name=node)

    def idle_nodes(self) -> set[str]:
        """Nodes that run nothing and take jobs."""
        answer = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False)
        return {line.split()[0] for line in answer.splitlines() if line.split()[1:] == ["idle"]}

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Standard output of a command that talks to this cluster."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by name. Values with spaces are cut."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        """For example RUNNING."""
        return self.job(job)["JobState"]

    def wait_for_end(self, job: str, seconds: float = 400.0) -> str:
        """The final state of a job."""

        def ended() -> str | None:
            state = self.state(job)
            return state if state in ENDED else None

        return str(wait_for(f"end of job {job}", ended, seconds, lambda: f"{self.job(job)}\n{self.logs()}"))

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        texts = []
        for path in sorted(self.root.glob("*.log")):
            texts.append(f"--- {path.name}")
            texts += path.read_text(errors="replace").splitlines()[-15:]
        return "\n".join(texts)

    def kill_node(self, node: str, process: int) -> None:
        """Ends the slurmd of a node, a process of a job there and all above it, as a power cut does."""
        daemon = self.daemons.pop(node)
        doomed = [daemon.pid]
        while process > 1:
            doomed.append(process)
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def stop(self) -> None:
        """Cancels what runs, ends the daemons, removes the directory."""
        self._stopping.set()
        if self._hastener.is_alive():
            self._hastener.join()
        if "slurmctld" in self.daemons:
            self.run("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 10
            while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(3)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def _spawn(self, command: str, *arguments: str, name: str | None = None) -> None:
        path = program(command)
        assert path is not None
        with (self.root / f"{name or command}.out").open("ab") as output:
            self.daemons[name or command] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, cwd=self.root,
            )  # fmt: skip
