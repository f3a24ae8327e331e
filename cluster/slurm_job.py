"""Slurm commands of a running job: check its nodes, requeue itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from cluster.chain import LOGS, SCRIPTS
from core.files.atomic import write_atomic

BAD_NODES = "bad-nodes"
"""A file beside the scripts: nodes that failed the check before a start, one per line."""
CLEANING = 10
"""Seconds between two starts of a job: a start on nodes that still clean up waits for its steps
forever."""
_RELEASE = (
    "for _ in $(seq 60); do sleep 1; scontrol show job $0 | grep -q JobState=PENDING && "
    f'scontrol update jobid=$0 "$@" starttime=now+{CLEANING} && break; done'
)
"""Ends Slurm's hold of two minutes on a requeued job, if the site permits it."""


def queue_again(code: int, out: Path) -> None:
    """Requeue this job without bad nodes, and end Slurm's hold of two minutes.

    Sites with exit code 75 in RequeueExit requeue it themselves.
    """
    number = os.environ["SLURM_JOB_ID"]
    subprocess.Popen(
        ["bash", "-c", _RELEASE, number, *without_bad(out)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    exits = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    line = next((x for x in exits.stdout.splitlines() if x.startswith("RequeueExit ")), "")
    if str(code) not in line.partition("=")[2].strip().split(","):
        subprocess.run(["scontrol", "requeue", number], check=False)


def leave_out(out: Path, bad: Iterable[str]) -> bool:
    """Record bad nodes for all jobs of a chain; True if enough others are left for this job."""
    known = sorted({*bad, *bad_before(out)})
    write_atomic(out / SCRIPTS / BAD_NODES, "".join(f"{node}\n" for node in known).encode())
    command = ["sinfo", "-h", "-N", "-o", "%N", "-p", os.environ["SLURM_JOB_PARTITION"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    others = set(done.stdout.split()) - set(known)
    return len(others) >= len(os.environ["TAPIR_NODES"].split())


def bad_before(out: Path) -> list[str]:
    """The recorded bad nodes."""
    path = out / SCRIPTS / BAD_NODES
    return path.read_text().split() if path.exists() else []


def without_bad(out: Path) -> list[str]:
    """The scontrol option that keeps a pending job off the bad nodes."""
    nodes = bad_before(out)
    return [f"excnodelist={','.join(nodes)}"] if nodes else []


def was_cancelled() -> bool:
    """True if this process's Slurm job was cancelled."""
    number = os.environ.get("SLURM_JOB_ID")
    return number is not None and last_words(number).startswith("CANCELLED")


def last_words(number: str) -> str:
    """State and exit code of a job that has left the queue, while Slurm remembers it."""
    words = _words(number)
    return f"{words.get('JobState', 'gone')} (exit code {words.get('ExitCode', '?')})"


def _words(number: str) -> dict[str, str]:
    """The fields of `scontrol show job`."""
    done = subprocess.run(
        ["scontrol", "-o", "show", "job", number], capture_output=True, text=True, check=False
    )
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def bad_nodes(out: Path, name: str, gpus: int) -> dict[str, str]:
    """Run `tapir doctor --node` on every node of this job; returns problems by node."""
    nodes = os.environ["TAPIR_NODES"].split()
    folder = out / LOGS / "doctor"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{name}-{os.environ['SLURM_JOB_ID']}"
    doctor = ["-P", "-m", "tapir", "doctor", "--node", "--json", f"--out={out}", f"--gpus={gpus}"]
    count = f"--ntasks={len(nodes)}"
    command = ["srun", "--export=ALL", f"--nodes={len(nodes)}", count, "--ntasks-per-node=1"]
    command += ["--kill-on-bad-exit=0", f"--output={folder / prefix}-%n.txt", sys.executable]
    subprocess.run([*command, *doctor], check=False)
    verdicts = [_verdict(folder / f"{prefix}-{i}.txt") for i in range(len(nodes))]
    return {node: problem for node, problem in zip(nodes, verdicts, strict=True) if problem}


def _verdict(report: Path) -> str:
    """The problems in the last line of a doctor's report; empty if there are none."""
    try:
        rows = json.loads(report.read_text().splitlines()[-1])["rows"]
    except (OSError, ValueError, IndexError, KeyError):
        return "tapir doctor gave no answer there"
    bad = [row for row in rows if row["status"] == "bad"]
    return "; ".join(f"{row['check']}: {row['observed']} ({row['fix']})" for row in bad)
