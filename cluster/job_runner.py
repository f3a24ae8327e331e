"""`tapir job`: checks the nodes, runs a command, forwards signals, writes the marker, retries.

Slurm, Kubernetes and the local runner all start jobs through it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal

from cluster.chain import CANCELLED, WORKER, read_marker, write_marker
from cluster.processes import die_with_parent, stop
from cluster.slurm.job import queue_again, was_cancelled
from cluster.slurm.placement import Placement
from cluster.slurm.watch import Watches
from core.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_WRONG_INPUT, InputError
from core.log import LOG
from core.stop import STOP_FILE
from core.workers import WORKER as ARRAY_WORKER

_LOOK = 0.2
_LOOK_FOR_MARKERS = 2.0


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings of `tapir job`."""

    name: str = ""
    """Name in the log; {worker} is replaced by the number of this array worker."""
    out: Path = Path("runs")
    """Folder of the chain."""
    markers: str = ""
    """Folder or s3://bucket/prefix of the markers; by default `markers` in --out."""
    after: tuple[str, ...] = ()
    """Markers to wait for first."""
    marker: str = ""
    """Marker to write after success; empty = none."""
    fingerprint: str = ""
    """Digest of the stage's command, for the marker."""
    again: Literal["here", "slurm", "no"] = "here"
    """After a failure or a preemption: restart the command here, let Slurm requeue the job, or
    leave both to the caller, who sees the exit code."""
    retries: int = 2
    """Failures after which it is not started again."""
    saves: bool = False
    """On a stop request the command saves by itself; other commands are ended at once."""
    grace: float = 600.0
    """Seconds it may take to save."""
    check_nodes: bool = False
    """Run `tapir doctor` on every node of the Slurm job first, and exclude bad nodes."""
    gpus: int = 0
    """GPUs that each node must have."""
    nodes: int = 0
    """Nodes that the command uses; others of the Slurm job are spares. 0 = all, no spares."""


def run_job(settings: JobSettings, command: Sequence[str]) -> int:
    """Run a command to its end; returns the exit code of the job.

    Raises: InputError for a command without a name for its log and files.
    """
    if command and not settings.name:
        raise InputError("give the job a --name: its files are called by it")
    name, marker = (text.replace(WORKER, _worker()) for text in (settings.name, settings.marker))
    settings = replace(settings, name=name, marker=marker)
    place = settings.markers or str(settings.out / "markers")
    with _Asked() as asked:
        for name in settings.after:
            if not _wait_for(place, name, asked):
                return EXIT_PREEMPTED
        if not command:
            return 0
        if settings.marker and read_marker(place, settings.marker):
            LOG.info("job %s has ended well before", settings.name)
            return 0
        with Watches(settings.out, settings.name) if settings.nodes else nullcontext():
            return _run(settings, command, place, asked)


def _run(settings: JobSettings, command: Sequence[str], place: str, asked: "_Asked") -> int:
    began = time.time()
    placement = _placement(settings)
    failures = settings.out / "jobs" / f"{settings.name}.failures"
    while True:
        placed = placement.place(command) if placement else command
        if placement and not placed:
            return placement.queue_again()
        code = _run_once(settings, placed, asked)
        code = code or _of_lost_nodes(placement)
        if code == 0:
            failures.unlink(missing_ok=True)
            if settings.marker:
                facts: dict[str, object] = {"job": settings.name, "began": began}
                facts |= {"command": settings.fingerprint, "seconds": time.time() - began}
                write_marker(place, settings.marker, facts)
            return 0
        if (settings.out / CANCELLED).exists() or was_cancelled():
            LOG.warning("job %s was cancelled", settings.name)
            return code
        preempted = asked.count > 0 or code == EXIT_PREEMPTED
        count = 0 if preempted else _count(failures)
        if code == EXIT_WRONG_INPUT or count > settings.retries:
            LOG.error("job %s ended with exit code %d", settings.name, code)
            return code
        code = EXIT_PREEMPTED if preempted else code
        if settings.again == "slurm" and (preempted or not settings.nodes):
            queue_again(EXIT_PREEMPTED, settings.out)
            return EXIT_PREEMPTED
        if settings.again == "no" or preempted:
            return code
        LOG.warning("job %s failed (exit code %d); it starts again", settings.name, code)


def _run_once(settings: JobSettings, command: Sequence[str], asked: "_Asked") -> int:
    """Run the command; a stop request is forwarded as a file, else as SIGTERM."""
    if asked.count:
        return EXIT_PREEMPTED
    request = settings.out / "jobs" / f"{settings.name}.stop"
    request.parent.mkdir(parents=True, exist_ok=True)
    request.unlink(missing_ok=True)
    environment = {**os.environ, STOP_FILE: str(request.resolve())}
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    since: float | None = None
    try:
        while process.poll() is None:
            time.sleep(_LOOK)
            if asked.count and since is None:
                since = time.monotonic()
                LOG.warning("job %s: asked to stop", settings.name)
                request.touch()
                if not settings.saves:
                    process.terminate()
            late = since is not None and time.monotonic() - since > settings.grace
            if asked.count > 1 or late:
                stop(process)
    finally:
        stop(process)
        request.unlink(missing_ok=True)
    code = process.returncode
    return code if code >= 0 else EXIT_FAILED


def _placement(settings: JobSettings) -> Placement | None:
    """What puts the command on nodes of the Slurm job, if there is one."""
    if settings.again != "slurm":
        return None
    check, used = settings.check_nodes, settings.nodes
    return Placement(settings.out, settings.name, settings.gpus, used, check)


def _of_lost_nodes(placement: Placement | None) -> int:
    """Exit code of a start that seems to have ended well: not 0 if it has lost nodes."""
    lost = placement.lost() if placement else []
    if lost:
        LOG.error("lost: %s", ", ".join(lost))
    return EXIT_FAILED if lost else 0


def _worker() -> str:
    """Number of this array worker."""
    number = os.environ.get(ARRAY_WORKER, "").partition("/")[0]
    others = (os.environ.get(n) for n in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"))
    return number or next((other for other in others if other is not None), "0")


def _wait_for(place: str, name: str, asked: "_Asked") -> bool:
    """Wait until a marker exists and is intact; False if this process was asked to stop."""
    told = False
    while not read_marker(place, name):
        if asked.count:
            return False
        if not told:
            LOG.info("waiting for %s/%s", place, name)
            told = True
        time.sleep(_LOOK_FOR_MARKERS)
    return True


def _count(failures: Path) -> int:
    """Number of failures of the job, including this one."""
    try:
        count = int(failures.read_text()) + 1
    except (OSError, ValueError):
        count = 1
    failures.parent.mkdir(parents=True, exist_ok=True)
    failures.write_text(str(count))
    return count


class _Asked:
    """Counts SIGTERM and SIGUSR1 instead of exiting; a preempted job gets both."""

    def __enter__(self) -> "_Asked":
        self._times: list[float] = []
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def count(self) -> int:
        """1 after the first signal, more if another one came over a second later."""
        return len(self._times)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._times or now - self._times[-1] > 1.0:
            self._times.append(now)
