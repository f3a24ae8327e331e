"""A private Slurm: several slurmd "nodes" on this host, without systemd, ended by their PIDs."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil

from core.launch_environment import free_ports

_CONFIG = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/sock
CryptoType=crypto/munge
SlurmctldPort={port}
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldParameters=enable_configless
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=200000,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=600
InactiveLimit=0
KillWait=5
Waittime=0
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmctldDebug=info
SlurmdDebug=info
PropagateResourceLimits=NONE
"""
_NODE = "NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000\n"
_PARTITIONS = """\
PartitionName=main Nodes=n[1-{nodes}] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=30
PartitionName=urgent Nodes=n[1-{nodes}] State=UP PriorityTier=10 PreemptMode=OFF
"""
_READY_SECONDS = 30


class Slurm:
    """A running cluster; `environment` is what its clients need."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.root, self._nodes = root, nodes
        self.name = f"tapir{secrets.token_hex(4)}"
        self.config = root / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.config)}

    def ask(self, *command: str) -> str:
        """Run one of Slurm's own commands."""
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **self.environment}
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def queue(self) -> str:
        """All jobs that have not ended."""
        return self.ask("squeue", "-h", "-o", "%i %j %T %r %N")

    def start_node(self, number: int, files: int = 4096) -> None:
        """Start or restart a slurmd whose jobs may open `files` files."""
        (self.root / "spool" / f"n{number}").mkdir(parents=True, exist_ok=True)
        command = ["/usr/sbin/slurmd", "-N", f"n{number}", "-f", str(self.config)]
        subprocess.run(["prlimit", f"--nofile={files}", *command], check=True)

    def kill_node(self, number: int) -> None:
        """Kill a slurmd and all processes of its node at once, like a lost machine."""
        pids = [int((self.root / "run" / f"slurmd-n{number}.pid").read_text())]
        pids += [process.pid for process in psutil.process_iter() if _is_of(process, self, number)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """PIDs of all steps and tasks of all nodes."""
        nodes = range(1, self._nodes + 1)
        each = psutil.process_iter()
        return [p.pid for p in each if any(_is_of(p, self, number) for number in nodes)]


def _is_of(process: psutil.Process, slurm: Slurm, number: int) -> bool:
    """Say whether a process is a step or a task of a node of this cluster."""
    spool = str(slurm.root / "spool" / f"n{number}")
    try:
        if process.name().startswith("slurmstepd"):
            log = str(slurm.root / "log" / f"slurmd-n{number}.log")
            return process.cwd() == spool or any(f.path == log for f in process.open_files())
        variables = process.environ()
    except (psutil.Error, OSError):
        return False
    node, cluster = variables.get("SLURMD_NODENAME"), variables.get("SLURM_CLUSTER_NAME")
    return node == f"n{number}" and cluster == slurm.name


@contextlib.contextmanager
def private_slurm(root: Path, nodes: int = 2, bad: int = 0, settings: str = "") -> Iterator[Slurm]:
    """Run a Slurm of our own in a folder, until the context ends; node `bad` is cramped.

    `settings` are further lines of its slurm.conf.
    """
    for name in ("state", "spool", "log", "run", "munge"):
        (root / name).mkdir(parents=True)
    root.chmod(0o755)
    slurm = Slurm(root, nodes)
    with ExitStack() as stack:
        stack.callback(_end, slurm)
        _start_munge(root / "munge")
        _write_config(slurm, nodes, settings)
        subprocess.run(["/usr/sbin/slurmctld", "-f", str(slurm.config)], check=True)
        for number in range(1, nodes + 1):
            slurm.start_node(number, files=256 if number == bad else 4096)
        _wait_until_idle(slurm, nodes)
        yield slurm


def _start_munge(folder: Path) -> None:
    folder.chmod(0o755)
    key = folder / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    subprocess.run(
        [
            "/usr/sbin/munged",
            "--force",
            f"--key-file={key}",
            f"--socket={folder / 'sock'}",
            f"--pid-file={folder / 'pid'}",
            f"--log-file={folder / 'log'}",
            f"--seed-file={folder / 'seed'}",
            "--num-threads=2",
        ],
        check=True,
    )


def _write_config(slurm: Slurm, nodes: int, settings: str) -> None:
    host = socket.gethostname().split(".")[0]
    ports = free_ports(nodes + 1)
    text = _CONFIG.format(name=slurm.name, host=host, root=slurm.root, port=ports[0])
    text += settings
    for number, port in enumerate(ports[1:], 1):
        text += _NODE.format(i=number, host=host, port=port)
    slurm.config.write_text(text + _PARTITIONS.format(nodes=nodes))


def _wait_until_idle(slurm: Slurm, nodes: int) -> None:
    until = time.monotonic() + _READY_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(AssertionError):
            if len(slurm.ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle").split("\n")) > nodes:
                return
        time.sleep(0.1)
    raise AssertionError((slurm.root / "log" / "slurmctld.log").read_text()[-2000:])


def _end(slurm: Slurm) -> None:
    """End the cluster's daemons by their PID files, and all processes of its nodes."""
    with contextlib.suppress(AssertionError, FileNotFoundError):
        slurm.ask("scancel", "--full", "--user=root")
    files = [*(slurm.root / "run").glob("*.pid"), slurm.root / "munge" / "pid"]
    pids = [int(path.read_text()) for path in files if path.exists()]
    for pid in [*slurm.processes(), *pids]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in [*slurm.processes(), *pids]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
