"""One logger and one progress display: rich on a terminal, plain lines otherwise."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from core.launch_environment import as_number

LOG = logging.getLogger("tapir")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
PLAIN_INTERVAL = 10.0
"""Seconds between two plain progress lines."""
SLOW_SECONDS = 5.0
"""Seconds after which a phase without progress logs that it still runs."""


class HideSecrets(logging.Filter):
    """Replace the values of credentials in the environment by stars."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        for name in _SECRETS:
            value = os.environ.get(name)
            if value and value in text:
                text = text.replace(value, "***")
        record.msg, record.args = text, ()
        return True


def set_up_logging(rank: int | None = None) -> None:
    """Send the log to standard error; ranks other than 0 only report warnings.

    `rank` is by default the one that torchrun, mpirun or srun gave.
    """
    if rank is None:
        told = (as_number(os.environ.get(name, "")) for name in _RANKS)
        rank = next((number for number in told if number is not None), 0)
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s", "%H:%M:%S"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(HideSecrets())
    LOG.handlers[:] = [handler]
    LOG.propagate = False
    LOG.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class Meter:
    """Progress of a long job; `update` is cheap enough for every step."""

    def __init__(self, name: str, total: int, bar: Progress | None) -> None:
        self._name, self._total, self._bar = name, total, bar
        self._task = bar.add_task(name, total=total or None, note="") if bar else None
        self._began = self._printed = time.monotonic()
        self._first: int | None = None

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are finished."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        self._first = done if self._first is None else self._first
        now = time.monotonic()
        if now - self._printed >= PLAIN_INTERVAL or done == self._total:
            self._printed = now
            moved = max(done - self._first, 0)
            known = moved and self._total
            left = (self._total - done) * (now - self._began) / moved if known else None
            eta = "" if left is None else f", {left:.0f} s left"
            place = f"{done}/{self._total}" if self._total else str(done)
            LOG.info("%s %s%s%s", self._name, place, f" {note}" if note else "", eta)


@contextmanager
def slow(what: str) -> Iterator[None]:
    """Log that the enclosed code still runs: after SLOW_SECONDS, then at doubling intervals."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = SLOW_SECONDS
        while not done.wait(wait):
            LOG.info("%s: for %.0f s now", what, time.monotonic() - began)
            wait *= 2

    thread = threading.Thread(target=tell, name="slow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def progress(name: str, total: int, show: bool = True) -> Iterator[Meter]:
    """Show the progress of a job: a bar on a terminal, a line every 10 s elsewhere.

    A total of 0 means unknown.
    """
    if not (show and sys.stderr.isatty()):
        meter = Meter(name, total, None)
        if not show:
            meter.update = lambda done, note="": None  # type: ignore[method-assign]
        yield meter
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}"))
    note = TextColumn("{task.fields[note]}")
    with Progress(*columns, note, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield Meter(name, total, bar)
