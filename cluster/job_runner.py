"""`tapir job`: checks the nodes, runs a command, forwards signals, writes the marker, starts again.

Slurm, Kubernetes and the local runner all start jobs through it.
"""

import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal

from cluster.chain import CANCELLED, CHAIN, SCRIPTS, WORKER, read_marker, write_marker
from cluster.processes import die_with_parent, stop
from cluster.slurm.job import queue_again, was_cancelled
from cluster.slurm.placement import Placement
from cluster.slurm.watch import Watches
from cluster.starts import Progress, Starts
from core.errors import (
    EXIT_FAILED,
    EXIT_GAVE_UP,
    EXIT_PREEMPTED,
    EXIT_WRONG_INPUT,
    ConfigError,
    InputError,
    of_files,
)
from core.files.reason import REASON_FILE, read_reason
from core.log import LOG
from core.stop import STOP_FILE
from core.storage.store import open_store
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
    retries: int = 3
    """Failures without progress that are forgiven; the next one ends the job with exit code 70."""
    stall_hours: float = 24.0
    """Hours that its starts may run without progress, also if each was asked to stop."""
    checkpoints: str = ""
    """Folder or s3://bucket/prefix of its checkpoints: a newer one is progress."""
    shards: str = ""
    """Folder or s3://bucket/prefix that a data job fills: more finished files are progress."""
    worker: str = ""
    """Number of a worker of the data job: tasks that it has finished itself are its progress."""
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
    """Run a command to its end; returns the exit code of the job: docs/reference/exit-codes.md.

    Raises: InputError for a command without a name for its log and files.
    """
    if command and not settings.name:
        raise InputError("give the job a --name: its files are called by it")
    if settings.retries < 0 or not 0 < settings.stall_hours < math.inf:
        raise ConfigError("--retries must not be negative, and --stall-hours must be positive")
    if (settings.again == "slurm" or settings.nodes) and "SLURM_JOB_ID" not in os.environ:
        raise InputError(
            "--again slurm and --nodes are for a job of Slurm, and this is none: SLURM_JOB_ID is "
            "not set; start it by sbatch or `tapir submit --to slurm`, or leave them out"
        )
    worker = _worker()
    name, marker = (text.replace(WORKER, worker) for text in (settings.name, settings.marker))
    is_first = worker == "0" or WORKER in settings.marker
    number = settings.worker.replace(WORKER, worker)
    settings = replace(settings, name=name, marker=marker, worker=number)
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
        if not is_first:  # of the nodes of one job the first writes the marker: it holds rank 0
            settings = replace(settings, marker="")
        with Watches(settings.out, settings.name) if settings.nodes else nullcontext():
            return _run(settings, command, place, asked)


def _run(settings: JobSettings, command: Sequence[str], place: str, asked: "_Asked") -> int:
    """Start the command until it succeeds, gives up, or is left to the scheduler."""
    began, record = time.time(), _record_name(settings)
    files = settings.out / SCRIPTS
    files.mkdir(parents=True, exist_ok=True)
    starts = Starts(
        open_store(settings.markers or str(files)),
        record,
        Progress(checkpoints=settings.checkpoints, shards=settings.shards, worker=settings.worker),
        settings.retries,
        settings.stall_hours,
    )
    left, placement = files / f"{record}.reason", _placement(settings)
    while True:
        before = read_reason(left)
        if why := starts.begin(before.text if before else ""):
            return _give_up(settings, why)
        left.unlink(missing_ok=True)
        placed = placement.place(command) if placement else command
        if placement and not placed:
            starts.end(EXIT_PREEMPTED)
            return placement.queue_again()
        code, reason = _run_once(settings, placed, asked, left)
        if code == 0 and placement and (lost := placement.lost()):
            code, reason = EXIT_FAILED, f"lost nodes: {', '.join(lost)}"
        if code == 0:
            _succeed(settings, place, began, starts)
            return 0
        final = code in (EXIT_WRONG_INPUT, EXIT_GAVE_UP)
        preempted = not final and (asked.count > 0 or code == EXIT_PREEMPTED)
        why = starts.end(EXIT_PREEMPTED if preempted else code, reason)
        if (settings.out / CANCELLED).exists() or was_cancelled():
            LOG.warning("job %s was cancelled", settings.name)
            return code
        if final:
            LOG.error("job %s ended with exit code %d: %s", settings.name, code, reason)
            return code
        if why:
            return _give_up(settings, why)
        if settings.again == "slurm" and (preempted or not settings.nodes):
            queue_again(EXIT_PREEMPTED, settings.out)
            return EXIT_PREEMPTED
        if settings.again == "no" or preempted:
            return EXIT_PREEMPTED if preempted else code
        LOG.warning("job %s failed (exit code %d); it starts again", settings.name, code)


def _record_name(settings: JobSettings) -> str:
    """Name of the record of starts: each pod of a job on several nodes has its own."""
    pod = os.environ.get("JOB_COMPLETION_INDEX", "")
    alone = not pod or settings.name.endswith(f"-{pod}")
    return settings.name if alone else f"{settings.name}-{pod}"


def _give_up(settings: JobSettings, why: str) -> int:
    again = f"tapir resume {shlex.quote(str(settings.out))}"
    again = again if (settings.out / CHAIN).exists() else "start it again"
    LOG.error("job %s gives up: %s. Mend the cause, then: %s", settings.name, why, again)
    return EXIT_GAVE_UP


def _succeed(settings: JobSettings, place: str, began: float, starts: Starts) -> None:
    if settings.marker:
        facts: dict[str, object] = {"job": settings.name, "began": began}
        facts |= {"command": settings.fingerprint, "seconds": time.time() - began}
        write_marker(place, settings.marker, {**facts, "starts": starts.attempt})
    starts.clear()


def _run_once(
    settings: JobSettings, command: Sequence[str], asked: "_Asked", left: Path
) -> tuple[int, str]:
    """Run the command; a stop request is forwarded as a file, else as SIGTERM.

    Returns its exit code and the error that it wrote to the file `left`.
    """
    if asked.count:
        return EXIT_PREEMPTED, "asked to stop"
    request = settings.out / SCRIPTS / f"{settings.name}.stop"
    request.unlink(missing_ok=True)
    environment = {**os.environ, STOP_FILE: str(request.resolve())}
    environment[REASON_FILE] = str(left.resolve())
    try:
        process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    except OSError as error:
        problem = of_files(error)
        return problem.exit_code, str(problem)
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
    return _explained(process.returncode, left)


def _explained(code: int, left: Path) -> tuple[int, str]:
    """The exit code and the error of an ended command; a rank's own come before a launcher's."""
    reason = read_reason(left)
    if code == 0:
        return 0, ""
    if reason is not None:
        return reason.job_code, reason.text
    if code < 0:
        return EXIT_FAILED, f"the command was killed ({signal.Signals(-code).name})"
    return code, f"exit code {code} without a message; the log has what it printed"


def _placement(settings: JobSettings) -> Placement | None:
    """What puts the command on nodes of the Slurm job, if there is one."""
    if settings.again != "slurm":
        return None
    check, used = settings.check_nodes, settings.nodes
    return Placement(settings.out, settings.name, settings.gpus, used, check)


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
