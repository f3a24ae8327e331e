"""Forks that start with all libraries imported, a few at a time."""

import gc
import importlib
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Work = Callable[[Path], None]
"""What a fork does with its folder."""


def preload(names: list[str], own: tuple[str, ...]) -> None:
    """Import libraries that the tests import, so that no fork has to."""
    for name in names:
        if name.split(".")[0] in (*own, "tests", "conftest") or name in sys.modules:
            continue
        try:
            importlib.import_module(name)
        except Exception:  # a fork imports it itself
            continue
    gc.collect()
    gc.freeze()


@dataclass
class _Fork:
    key: Any
    folder: Path
    seconds: float
    """Which it may take, without those in which others had the cores."""
    began: float
    look: float
    """When to look at it next."""

    def is_late(self, pid: int) -> bool:
        """True if it has computed, or slept, beyond its limit."""
        now = time.monotonic()
        if now < self.look:
            return False
        self.look = now + 0.2
        used, waited, ready = _cores(pid)
        if ready and used < self.seconds:
            return False  # its current wait is not in `waited` yet
        return now - self.began - waited > self.seconds


def run_forks(
    jobs: Iterator[tuple[Any, Work, float]], width: int
) -> Iterator[tuple[Any, Path, int | None]]:
    """Run (key, work, seconds) in forks, `width` at a time.

    Yields (key, the fork's folder, its exit status or None if it ran out of time); the folder is
    removed when the caller goes on. Seconds in which a fork could have run, but others had the
    cores, do not count.
    """
    running: dict[int, _Fork] = {}
    try:
        while True:
            while len(running) < width and (job := next(jobs, None)) is not None:
                key, work, seconds = job
                folder = Path(tempfile.mkdtemp(prefix="tapir-mutant-"))
                now = time.monotonic()
                running[_fork(work, folder, seconds)] = _Fork(
                    key, folder, seconds, now, now + seconds
                )
            if not running:
                return
            for pid, status in _ended(running):
                fork = running.pop(pid)
                yield fork.key, fork.folder, status
                shutil.rmtree(fork.folder, ignore_errors=True)
    finally:
        for pid, fork in running.items():
            _kill(pid)
            shutil.rmtree(fork.folder, ignore_errors=True)


def _fork(work: Work, folder: Path, seconds: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        most = math.ceil(2 * seconds) + 10  # CPU seconds, also if this process dies first
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        work(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(running: dict[int, _Fork]) -> list[tuple[int, int | None]]:
    """Forks that ended or were killed for their time; waits for at least one."""
    while True:
        exited: list[tuple[int, int | None]] = []
        for pid, fork in running.items():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _kill_group(pid)  # processes that the tests left
                exited.append((pid, status))
            elif fork.is_late(pid):
                _kill(pid)
                exited.append((pid, None))
        if exited:
            return exited
        time.sleep(0.01)


def _cores(session: int) -> tuple[float, float, bool]:
    """Seconds of a fork and its children on a core and in the run queue; and whether any of
    them is runnable now."""
    used, waited, ready = 0, 0, False
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdecimal() or os.getsid(int(entry.name)) != session:
                continue
            for task in (entry / "task").iterdir():
                ran, queued, _ = map(int, (task / "schedstat").read_text().split())
                used, waited = used + ran, waited + queued
                ready |= (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
        except OSError:  # it ended, or this kernel has no such counter
            continue
    return used / 1e9, waited / 1e9, ready


def _kill(pid: int) -> None:
    _kill_group(pid)
    os.waitpid(pid, 0)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
