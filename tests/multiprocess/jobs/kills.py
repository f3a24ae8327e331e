"""Workers of a job, each killed at random moments while it holds a task."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.keys import keyed_rng
from core.storage.store import Store
from data_pipeline.jobs.leases import read_leases
from tests.harness import ENVIRONMENT, PATIENCE

PAUSE = 0.3
"""Seconds before a task is marked (slowly.py); a kill falls anywhere in them, or before."""


class Workers:
    """Processes of one job, `arguments` without --worker; their output is in `folder`.

    A life marks one task before `finish`, so a job needs more tasks than lives and workers.
    """

    def __init__(
        self, arguments: Sequence[str], count: int, folder: Path, environment: dict[str, str]
    ) -> None:
        """`environment` is added to the tests' own."""
        self._gate, self._folder, self._count = folder / "gate", folder, count
        module = [sys.executable, "-P", "-m", "tests.multiprocess.jobs.slowly"]
        self._command = [*module, str(PAUSE), str(self._gate), *arguments]
        self._environment = {**ENVIRONMENT, **environment}
        self._running: list[tuple[int, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for _, process in self._running:
            process.kill()
            process.wait()

    def start(self, number: int) -> None:
        """Start a worker; two may have the same number."""
        with open(self._folder / f"log{number}", "ab") as log:
            process = subprocess.Popen(
                [*self._command, f"--worker={number}/{self._count}"],
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        self._running.append((number, process))

    def kill(
        self, numbers: Iterable[int], store: Store, prefixes: Sequence[str], *, again: bool
    ) -> None:
        """Kill each while it holds a lease below one of the prefixes; `again` starts it anew."""
        left = set(numbers)
        while left:
            number = self._holder(left, store, prefixes)
            time.sleep(float(keyed_rng(number, len(self._running), "kill").uniform(0, PAUSE)))
            at = [one for one, _ in self._running].index(number)
            process = self._running.pop(at)[1]
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait(PATIENCE) == -signal.SIGKILL, self.logs()
            left.remove(number)
            if again:
                self.start(number)

    def finish(self) -> None:
        """Let all that still run mark their tasks, and wait until they end."""
        self._gate.touch()
        codes = [process.wait(PATIENCE) for _, process in self._running]
        assert codes == [0] * len(codes), self.logs()

    def logs(self) -> str:
        """The last lines of all output."""
        return "\n".join(path.read_text()[-2000:] for path in self._folder.glob("log*"))

    def _holder(self, numbers: set[int], store: Store, prefixes: Sequence[str]) -> int:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for prefix in prefixes:
                for lease in read_leases(store, prefix):
                    number = int(lease["worker"].split("/")[0])
                    if number in numbers and not lease["dead"]:
                        return number
            ended = [
                n for n, process in self._running if n in numbers and process.poll() is not None
            ]
            assert not ended, f"workers {ended} ended by themselves: {self.logs()}"
            time.sleep(0.02)
        raise AssertionError(f"none of the workers {numbers} took a task: {self.logs()}")
