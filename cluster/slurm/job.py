"""Slurm commands of a running job: requeue it, leave bad nodes out, ask for its state."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cluster.chain import SCRIPTS
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
    release_later(number, out)
    exits = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    line = next((x for x in exits.stdout.splitlines() if x.startswith("RequeueExit ")), "")
    if str(code) not in line.partition("=")[2].strip().split(","):
        subprocess.run(["scontrol", "requeue", number], check=False)


def release_later(number: str, out: Path) -> None:
    """End Slurm's hold of two minutes as soon as the job is queued again, without bad nodes."""
    subprocess.Popen(
        ["bash", "-c", _RELEASE, number, *without_bad(out)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def leave_out(out: Path, bad: Iterable[str], needed: int) -> bool:
    """Record bad nodes for all jobs of a chain; True if `needed` others are in the partition."""
    known = sorted({*bad, *bad_before(out)})
    write_atomic(out / SCRIPTS / BAD_NODES, "".join(f"{node}\n" for node in known).encode())
    command = ["sinfo", "-h", "-N", "-o", "%N", "-p", os.environ["SLURM_JOB_PARTITION"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    others = set(done.stdout.split()) - set(known)
    return len(others) >= needed


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
    number = os.environ.get("SLURM_JOB_ID", "")
    mine = [task for task in _tasks(number) if task.get("JobId") == number] if number else []
    return any(task.get("JobState", "").startswith("CANCELLED") for task in mine)


def last_words(numbers: str) -> str:
    """State and exit code of jobs that have left the queue, while Slurm remembers them.

    `numbers` are joined by colons; of several tasks, the first that did not succeed is described.
    """
    tasks = [task for number in numbers.split(":") for task in _tasks(number)]
    bad = [task for task in tasks if task.get("JobState") != "COMPLETED"]
    task = (bad or tasks or [{}])[0]
    return f"{task.get('JobState', 'gone')} (exit code {task.get('ExitCode', '?')})"


def job_fields(number: str) -> dict[str, str]:
    """The fields of `scontrol show job`; none if Slurm does not answer."""
    return (_tasks(number) or [{}])[0]


def _tasks(number: str) -> list[dict[str, str]]:
    """The fields of a job, or of each task of an array."""
    command = ["scontrol", "-o", "show", "job", number]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [fields_of(line) for line in done.stdout.splitlines() if line.strip()]


def fields_of(line: str) -> dict[str, str]:
    """NAME=VALUE fields of one line of scontrol's; of a name that is there twice, the first."""
    words = [word.partition("=") for word in line.split() if "=" in word]
    return {name: value for name, _, value in reversed(words)}
