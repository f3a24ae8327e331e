"""The nodes of a running Slurm job: which are sound, and which of them its command uses.

SLURM_JOB_NODELIST is what the job was given; a job with spares keeps running when a node is lost,
so its nodes are asked for anew before each start.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.chain import LOGS
from cluster.processes import stop
from cluster.slurm.job import fields_of, job_fields
from core.launch_environment import FIRST_PORT, PORT_COUNT

NODE_LIST = "--nodelist={nodes}"
"""srun's option in a job's command: `tapir job` replaces {nodes} before each start."""
_STRIDE = 101
"""Between the ports of two starts, so that a start is not joined by ranks of a lost node."""
_CONNECT_SECONDS = 5.0
_CHECK_SECONDS = 600.0
_AT_ONCE = 32
_DEFAULT_PORT = "6818"
_SHOW_NODE = ("scontrol", "-o", "show", "node")
_NO_ANSWER = "tapir doctor gave no answer there"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as Slurm describes it."""

    name: str
    address: str
    """NodeAddr: a node's name need not resolve."""
    port: str
    """Port of its slurmd."""
    state: str
    """Slurm's words, e.g. ALLOCATED+DRAIN; a star means that it does not respond."""

    @property
    def is_down(self) -> bool:
        return any(word in self.state for word in ("DOWN", "FAIL", "NOT_RESPONDING", "*"))

    @property
    def is_draining(self) -> bool:
        """True if its administrator wants it back."""
        return "DRAIN" in self.state

    def answers(self) -> bool:
        """True if its slurmd accepts a connection."""
        try:
            address = (self.address, int(self.port))
            socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
        except OSError:
            return False
        return True


def allocated(number: str) -> list[str]:
    """Names of the nodes that a running job has now, in Slurm's order; none if it does not run."""
    fields = job_fields(number)
    nodes = fields.get("NodeList", "(null)")
    if fields.get("JobState") != "RUNNING" or nodes in ("", "(null)"):
        return []
    return _asked("scontrol", "show", "hostnames", nodes).split()


def describe(names: Sequence[str]) -> list[Node]:
    """Nodes by their names, in the same order; those that Slurm does not describe are left out."""
    if not names:
        return []
    rows = [fields_of(line) for line in _asked(*_SHOW_NODE, ",".join(names)).splitlines()]
    by_name = {row.get("NodeName"): row for row in rows}
    usual = _usual_port() if any("Port" not in row for row in rows) else _DEFAULT_PORT
    return [
        Node(
            name=name,
            address=row.get("NodeAddr", name),
            port=row.get("Port", usual),
            state=row.get("State", "DOWN"),
        )
        for name in names
        if (row := by_name.get(name))
    ]


def _usual_port() -> str:
    """Port of a slurmd for which scontrol names none."""
    for line in _asked("scontrol", "show", "config").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "SlurmdPort" and value.strip().isdecimal():
            return value.strip()
    return _DEFAULT_PORT


def _asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def live_nodes(number: str) -> list[Node]:
    """The nodes of a running job whose slurmd answers."""
    nodes = [node for node in describe(allocated(number)) if not node.is_down]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [node for node, up in zip(nodes, pool.map(Node.answers, nodes), strict=True) if up]


def chosen(nodes: Sequence[Node], count: int) -> list[Node]:
    """`count` of the nodes, in Slurm's order: the first ones, draining ones last."""
    preferred = sorted(nodes, key=lambda node: node.is_draining)[:count]
    return [node for node in nodes if node in preferred]


def environment_of(nodes: Sequence[Node], port: int, start: int) -> dict[str, str]:
    """Variables of a start on these nodes: their names, and where the ranks meet.

    `port` is that of start 0, which the script chose.
    """
    port = FIRST_PORT + (port - FIRST_PORT + _STRIDE * start) % PORT_COUNT
    return {
        "TAPIR_NODES": " ".join(node.name for node in nodes),
        "MASTER_ADDR": nodes[0].address,
        "MASTER_PORT": str(port),
    }


def on_nodes(command: Sequence[str], names: Sequence[str]) -> list[str]:
    """A job's command with its list of nodes."""
    given = NODE_LIST.format(nodes=",".join(names))
    return [given if word == NODE_LIST else word for word in command]


def bad_nodes(out: Path, name: str, gpus: int, nodes: Sequence[str]) -> dict[str, str]:
    """Run `tapir doctor --node` on nodes of this job; returns problems by node.

    A step ends on all nodes if one of them does not start it: nodes without a report are asked
    again, each by a step of its own.
    """
    check = _Check(out, name, gpus)
    verdicts = check.run(nodes)
    silent = [node for node in nodes if verdicts[node] is None]
    if silent and len(nodes) > 1:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for again in pool.map(lambda node: check.run([node]), silent):
                verdicts |= again
    told = {node: _NO_ANSWER if text is None else text for node, text in verdicts.items()}
    return {node: problems for node, problems in told.items() if problems}


class _Check:
    """Runs the check of nodes as steps of this job."""

    def __init__(self, out: Path, name: str, gpus: int) -> None:
        self._out, self._gpus = out, gpus
        self._folder = out / LOGS / "doctor"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._prefix = f"{name}-{os.environ['SLURM_JOB_ID']}"

    def run(self, nodes: Sequence[str]) -> dict[str, str | None]:
        """Each node's problems, empty if there are none; None without a report."""
        prefix = self._prefix if len(nodes) > 1 else f"{self._prefix}-{nodes[0]}"
        reports = [self._folder / f"{prefix}-{i}.txt" for i in range(len(nodes))]
        for report in reports:
            report.unlink(missing_ok=True)
        pattern = f"{str(self._folder).replace('%', '%%')}/{prefix}-%n.txt"
        process = subprocess.Popen(self._command(nodes, pattern))
        try:
            process.wait(_CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            stop(process)
        return {node: _verdict(report) for node, report in zip(nodes, reports, strict=True)}

    def _command(self, nodes: Sequence[str], pattern: str) -> list[str]:
        count = len(nodes)
        step = ["srun", "--export=ALL", f"--nodes={count}", f"--ntasks={count}"]
        step += ["--ntasks-per-node=1", f"--nodelist={','.join(nodes)}", "--overlap"]
        step += ["--kill-on-bad-exit=0", f"--output={pattern}"]
        doctor = ["-P", "-m", "tapir", "doctor", "--node", "--json", f"--gpus={self._gpus}"]
        return [*step, sys.executable, *doctor, f"--out={self._out}"]


def _verdict(report: Path) -> str | None:
    """The problems in the last line of a doctor's report; None if it has none."""
    try:
        rows = json.loads(report.read_text().splitlines()[-1])["rows"]
    except (OSError, ValueError, IndexError, KeyError):
        return None
    bad = [row for row in rows if row["status"] == "bad"]
    return "; ".join(f"{row['check']}: {row['observed']} ({row['fix']})" for row in bad)
