"""A watch on other nodes: a job whose batch host is lost is queued again.

With --no-kill Slurm keeps a job running without its batch script when the script's node is lost.
The script's process writes a heartbeat to the chain's folder; a step on another node reads it.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from cluster.chain import CANCELLED, LOGS, SCRIPTS
from cluster.processes import die_with_parent, stop
from cluster.slurm.job import job_fields, release_later
from cluster.slurm.nodes import allocated, describe
from core.log import LOG, set_up_logging

BEAT_SECONDS = 5.0
"""Between two heartbeats, and between two looks at them."""
SILENT_SECONDS = 45.0
"""Without a heartbeat for so long, the watch asks whether the batch host's slurmd answers."""
WATCHES = 2
"""Nodes that watch: the batch host and one of them may be lost at once."""
_RETRY_SECONDS, _LAST_SECONDS = 60.0, 30.0


class Watches:
    """Heartbeats of this process, and steps on other nodes that watch them."""

    def __init__(self, out: Path, name: str) -> None:
        self._out, self._name = out, name
        self._steps: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: list[str] = []
        self._later, self._count = 0.0, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Watches":
        beat_file(self._out, self._name).parent.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(_LAST_SECONDS)  # it may wait for a file system
        beat_file(self._out, self._name).unlink(missing_ok=True)

    def _run(self) -> None:
        """Beat until the end; srun's parent is this thread, so that it must end them."""
        while not self._end.is_set():
            try:
                self._beat()
                self._look()
            except OSError as error:
                LOG.warning("heartbeat of job %s: %s", self._name, error)
            self._end.wait(BEAT_SECONDS)
        for step in self._steps.values():
            stop(step)

    def _beat(self) -> None:
        """Overwrite the file: NFS shows a renamed one late to nodes that know its folder."""
        self._count += 1
        beat_file(self._out, self._name).write_text(f"{os.getpid()} {self._count}\n")

    def _look(self) -> None:
        """Start a step again that has ended, if there is a node for it."""
        for node in [node for node, step in self._steps.items() if step.poll() is not None]:
            del self._steps[node]
            self._ended.append(node)
        if len(self._steps) >= WATCHES or time.monotonic() < self._later:
            return
        self._later = time.monotonic() + _RETRY_SECONDS
        names = allocated(os.environ["SLURM_JOB_ID"])
        for node in watch_nodes(names, os.environ["SLURMD_NODENAME"], self._ended, self._steps):
            self._steps[node] = self._start(node)

    def _start(self, node: str) -> "subprocess.Popen[bytes]":
        """Start a step; srun's words about its end do not belong into the job's log."""
        words = self._out / LOGS / "doctor" / f"{self._name}-watch.txt"
        words.parent.mkdir(parents=True, exist_ok=True)
        with open(words, "ab") as output:
            return subprocess.Popen(
                _step(self._out, self._name, node),
                stdin=subprocess.DEVNULL,
                stderr=output,
                preexec_fn=die_with_parent,
            )


def watch_nodes(
    names: list[str], batch_host: str, ended: list[str], watching: Collection[str]
) -> list[str]:
    """Nodes on which a watch is to start: spares first, nodes where one has ended last."""
    others = [name for name in reversed(names) if name != batch_host and name not in watching]
    return sorted(others, key=ended.count)[: WATCHES - len(watching)]


def _step(out: Path, name: str, node: str) -> list[str]:
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--export=ALL"]
    step += [f"--nodelist={node}", "--input=none", "--output=/dev/null"]
    return [*step, sys.executable, "-P", "-m", "cluster.slurm.watch", str(out), name]


def beat_file(out: Path, name: str) -> Path:
    """The heartbeat of a job."""
    return out / SCRIPTS / f"{name}.beat"


class Pulse:
    """How long a text has not changed, by the reader's own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._text, self._since = clock, "", clock()

    def silent(self, text: str) -> float:
        """Seconds since the text changed."""
        if text != self._text:
            self._text, self._since = text, self._clock()
        return self._clock() - self._since


def is_lost(name: str) -> bool:
    """True if a node is down for Slurm, or its slurmd does not answer."""
    return any(node.is_down or not node.answers() for node in describe([name]))


def watch(out: Path, name: str, number: str, batch_host: str) -> None:
    """Queue a job again as soon as its batch host is lost; returns when that is done."""
    pulse = Pulse()
    while not (out / CANCELLED).exists():
        time.sleep(BEAT_SECONDS)
        silent = pulse.silent(_read(beat_file(out, name)))
        if silent < SILENT_SECONDS or not is_lost(batch_host):
            continue
        LOG.error(
            "job %s: batch host %s is lost, without a heartbeat for %.0f s; queued again",
            name,
            batch_host,
            silent,
        )
        release_later(number, out)
        if subprocess.run(["scontrol", "requeue", number], check=False).returncode == 0:
            return


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def main(out: Path, name: str) -> None:
    """Watch the job of this step; messages go to the job's own log."""
    with open(out / LOGS / f"{name}.log", "ab", buffering=0) as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    set_up_logging(0)
    number = os.environ["SLURM_JOB_ID"]
    watch(out, name, number, job_fields(number).get("BatchHost", ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
