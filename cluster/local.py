"""Run a chain as background processes of this machine, one job after the other."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from cluster.chain import CANCELLED, LOGS, SCRIPTS, Chain, Job, read_submitted
from cluster.processes import die_with_parent, is_alive
from cluster.starts import read_attempts
from core.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_WRONG_INPUT, InputError, TapirError
from core.files.atomic import canonical_json, held, write_atomic
from core.storage.store import open_store

RUNNER_LOG = "chain.log"
_STATE = "local.json"
_LOOK = 0.2
_END_SECONDS = 660
"""Seconds that `cancel` waits for the runner: a job may take ten minutes to save."""


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """What starts the ranks on this machine."""

    launcher: Literal["tapir", "mpirun"] = "tapir"
    """tapir supervises its ranks and restarts them; mpirun joins them by MPI, as a cluster does."""

    def problems(self) -> list[str]:
        if self.launcher not in ("tapir", "mpirun"):
            return [f"local.launcher={self.launcher!r} must be tapir or mpirun"]
        return []


def commands(chain: Chain, job: Job, config: LocalConfig) -> list[list[str]]:
    """Command lines of a job, one for each worker."""
    if config.launcher == "mpirun" and job.world > 1:
        beside = Path(chain.python).with_name("mpirun")
        mpirun = str(beside) if beside.exists() else "mpirun"
        return [[mpirun, "-np", str(job.world), *chain.tapir(*job.command)]]
    if not job.array:
        return [chain.tapir(*job.command)]
    count = job.resources.workers
    return [chain.tapir(*job.command, f"--worker={i}/{count}") for i in range(count)]


def submit(chain: Chain) -> dict[str, str]:
    """Start the runner of a chain, which outlives this process; returns its pid for each job.

    Call `write_submitted` first.
    """
    (chain.out / LOGS).mkdir(parents=True, exist_ok=True)
    log_file = chain.out / LOGS / RUNNER_LOG
    with open(log_file, "ab") as log:
        runner = subprocess.Popen(
            [sys.executable, "-P", "-m", "cluster.local", str(chain.out)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=chain.folder,
            start_new_session=True,
        )
    until = time.monotonic() + 30
    while _read(chain.out).get("pid") != runner.pid:
        if runner.poll() == EXIT_WRONG_INPUT:
            raise InputError(f"{chain.out} is running already: another submit was faster")
        if runner.poll() is not None or time.monotonic() > until:
            raise TapirError(f"the runner did not start; see {log_file}")
        time.sleep(_LOOK / 4)
    return {job.name: str(runner.pid) for job in chain.jobs}


def states(out: Path) -> dict[str, str]:
    """The state of each job; jobs of a dead runner are reported as such."""
    state = _read(out)
    alive = _runs(int(state.get("pid", 0)), out)
    by_job = dict(state.get("states", {}))
    return {
        name: text if alive or text not in ("running", "waiting") else "its runner has died"
        for name, text in by_job.items()
    }


def cancel(out: Path) -> None:
    """Stop the runner and all its processes, and wait for it."""
    pid = int(_read(out).get("pid", 0))
    if not _runs(pid, out):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + _END_SECONDS
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(_LOOK)


def _runs(pid: int, out: Path) -> bool:
    """True if a process is the runner of this chain: pids are reused after a reboot."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return is_alive(pid) and b"cluster.local" in words and str(out).encode() in words


def _read(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / SCRIPTS / _STATE).read_text()))
    except (OSError, ValueError):
        return {}


def _name(job: Job, worker: int) -> str:
    return f"{job.name}-{worker}" if job.array else job.name


class _Killed:
    """Decides which workers start again after their `tapir job` was killed."""

    def __init__(self, chain: Chain, job: Job) -> None:
        self._record, self._job = open_store(str(chain.out / SCRIPTS)), job
        self._attempts: dict[int, int] = {}
        self._unrecorded, self._most = 0, chain.retries

    def may_start_again(self, worker: int) -> bool:
        """True if its next start counts this one; a start that left no record is counted here."""
        attempts = read_attempts(self._record, _name(self._job, worker))
        self._unrecorded += attempts == self._attempts.get(worker, 0)
        self._attempts[worker] = attempts
        return self._unrecorded <= self._most


class Runner:
    """Runs the unfinished jobs of a chain, one after the other."""

    def __init__(self, out: Path) -> None:
        submitted = read_submitted(out)
        self._chain = submitted.chain.without_done()
        self._config = LocalConfig(**submitted.settings)  # type: ignore[arg-type]
        self._states = {job.name: "waiting" for job in self._chain.jobs}
        self._log = self._chain.out / LOGS / RUNNER_LOG
        self._asked = False

    def run(self) -> int:
        """Returns 0 if all jobs succeeded, else the exit code of the first that failed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        worst = 0
        self._write()
        doctor = self._chain.tapir("doctor", "--node", f"--out={self._chain.out}")
        if subprocess.run(doctor, cwd=self._chain.folder).returncode:
            for job in self._chain.jobs:
                self._note(job, f"not run: this machine is not fit, see {self._log}")
            return EXIT_FAILED
        for job in self._chain.jobs:
            if self._asked or any(
                self._states.get(name) not in (None, "done") for name in job.after
            ):
                self._note(job, "not run: an earlier job failed")
                continue
            self._note(job, "running")
            code = self._run(job)
            worst = worst or code
            self._note(job, "done" if code == 0 else f"failed (exit code {code})")
        return EXIT_PREEMPTED if self._asked else worst

    def _run(self, job: Job) -> int:
        """Run all workers of a job, at most `parallelism` at once; returns the exit code."""
        left = list(enumerate(commands(self._chain, job, self._config)))
        running: dict[subprocess.Popen[bytes], tuple[int, list[str]]] = {}
        most, worst = job.resources.parallelism or len(left), 0
        killed = _Killed(self._chain, job)
        while running or (left and not self._asked):
            while left and len(running) < most and not self._asked:
                worker = left.pop(0)
                running[self._start(job, *worker)] = worker
            time.sleep(_LOOK)
            if self._asked:
                for process in running:
                    process.terminate()
                codes = [process.wait() for process in running]
                return max([EXIT_PREEMPTED, *codes])
            for process in [p for p in running if p.poll() is not None]:
                worker = running.pop(process)
                if process.returncode < 0 and killed.may_start_again(worker[0]):
                    left.append(worker)
                    continue
                worst = worst or (process.returncode if process.returncode >= 0 else EXIT_FAILED)
        return worst

    def _start(self, job: Job, worker: int, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        chain = self._chain
        wrapped = chain.wrapped(job, _name(job, worker), list(command))
        passed = {name: os.environ[name] for name in chain.passed if name in os.environ}
        with open(chain.log(job, str(worker) if job.array else ""), "ab") as log:
            return subprocess.Popen(
                wrapped,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=chain.folder,
                env=passed,
                preexec_fn=die_with_parent,
            )

    def _note(self, job: Job, state: str) -> None:
        self._states[job.name] = state
        self._write()

    def _write(self) -> None:
        body = {"pid": os.getpid(), "states": self._states}
        write_atomic(self._chain.out / SCRIPTS / _STATE, canonical_json(body))

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True


def dry_run(chain: Chain, config: LocalConfig) -> str:
    """The chain as a shell script; workers run one after the other."""
    lines = ["set -e", shlex.join(["cd", str(chain.folder)])]
    for job in chain.jobs:
        lines.append(f"# {job.name}")
        lines += [shlex.join(command) for command in commands(chain, job, config)]
    return "\n".join(lines) + "\n"


def main(out: Path) -> int:
    """Run a chain from its folder, under a lock that admits one runner."""
    with held(out / SCRIPTS, "chain"):
        (out / CANCELLED).unlink(missing_ok=True)
        return Runner(out).run()


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except TapirError as error:
        print(f"tapir: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
