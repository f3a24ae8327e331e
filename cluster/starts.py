"""The record of a job's starts: failures are forgiven by progress, a crash loop ends the job.

A node that dies writes nothing, so starts are recorded when they begin. A start failed unless its
end says otherwise. What counts are the failed starts that left the job where it is now: the one
that made the newest checkpoint, and those after it.
"""

import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime

from core.config import from_json, to_json
from core.errors import (
    EXIT_GAVE_UP,
    EXIT_PREEMPTED,
    EXIT_WRONG_INPUT,
    AbsentError,
    ConfigError,
    TapirError,
)
from core.files.atomic import canonical_json
from core.log import LOG
from core.storage.store import Store, open_store

STARTS = ".starts"
"""Suffix of the record, after the job's name."""
_CHECKPOINT = re.compile(r"step-(\d+)/manifest\.json")
_SHARDS, _DONE = (".tar", ".safetensors"), "_done/"
_LEDGER = re.compile(r"(?:^|/)_ledger/(\d+)-[^/]*\.json$")
_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a job."""

    attempt: int
    """1 for the first start."""
    time: float
    """When it began, in seconds since the epoch."""
    progress: int
    """The best progress before it."""
    code: int | None = None
    """Exit code of its end; None while it runs, and for ever if its node died."""
    seconds: float = 0.0
    """How long it ran, if its end is known."""
    reason: str = ""
    """Why it ended."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a job's progress shows; without a place, there is none before its end."""

    checkpoints: str = ""
    """Place of a training's checkpoints: the step of the newest whole one counts."""
    shards: str = ""
    """Place of a data job's output: the number of finished files counts."""
    worker: str = ""
    """Number of one of the data job's workers: the tasks in its own ledgers count."""

    def read(self) -> int:
        """The progress now; 0 if there is none, or if the store does not answer."""
        try:
            if self.checkpoints:
                names = open_store(self.checkpoints).names("step-")
                steps = (_CHECKPOINT.fullmatch(name) for name in names)
                return max((int(step[1]) for step in steps if step), default=0)
            if self.shards:
                store = open_store(self.shards)
                if self.worker:
                    return _rows_of_worker(store, self.worker)
                return sum(name.endswith(_SHARDS) or _DONE in name for name in store.names())
        except TapirError as error:
            LOG.warning("the job's progress cannot be read: %s", error)
        return 0

    def describe(self, amount: int) -> str:
        """Where the job is at some progress, as the end of a sentence; empty without a place."""
        if self.checkpoints:
            return f" after the checkpoint of step {amount}" if amount else " before a checkpoint"
        what = "tasks of its own" if self.worker else "finished files"
        return f" after {amount} {what}" if self.shards else ""


def _rows_of_worker(store: Store, worker: str) -> int:
    """Tasks in the ledgers of all starts of a worker (data_pipeline/jobs/ledger.py)."""
    rows = 0
    for name in store.names():
        if (match := _LEDGER.search(name)) and match[1] == worker:
            with suppress(AbsentError, ValueError, KeyError, TypeError):
                rows += len(json.loads(store.get(name))["rows"])
    return rows


def failed_starts(starts: Sequence[Start], now: int) -> list[Start]:
    """The failed starts that ended at progress `now`, with the one that made it."""
    return [start for start in _ended_at(starts, now) if start.code not in (0, EXIT_PREEMPTED)]


def _ended_at(starts: Sequence[Start], now: int) -> list[Start]:
    """The starts that ended at progress `now`: each ended at the progress before the next."""
    ends = [*(start.progress for start in starts), now][1:]
    return [start for start, end in zip(starts, ends, strict=True) if end == now]


def idle_seconds(starts: Sequence[Start], now: int) -> float:
    """Seconds that starts ran without progress, as far as their ends are known."""
    return sum(start.seconds for start in starts if start.progress == now)


class Starts:
    """The starts of one job, in a file of its own."""

    def __init__(
        self, store: Store, name: str, progress: Progress, retries: int, stall_hours: float
    ) -> None:
        self._store, self._name, self._progress = store, _file(name), progress
        self._retries, self._stall_hours = retries, stall_hours
        self._starts: list[Start] = []
        self._began = time.monotonic()

    @property
    def attempt(self) -> int:
        """The number of this start."""
        return self._starts[-1].attempt

    def begin(self, left: str = "") -> str:
        """Record a start; returns why the job gives up instead, or an empty text.

        `left` is the error that the start before left, if it did not see its end. A start after
        the job has given up begins a new count: somebody wants another try.
        """
        self._starts, gave_up = _read(self._store, self._name)
        attempt = self._starts[-1].attempt + 1 if self._starts else 1
        if self._starts and self._starts[-1].code is None and left:
            self._starts[-1] = replace(self._starts[-1], reason=left)
        now = self._now()
        if gave_up:
            self._starts = []
        elif why := self._why(now):
            return why
        self._starts = _ended_at(self._starts, now)  # the others count no more
        self._starts.append(Start(attempt=attempt, time=time.time(), progress=now))
        self._began = time.monotonic()
        self._write()
        return ""

    def end(self, code: int, reason: str = "") -> str:
        """Record the end of this start; returns why there should be no other, or an empty text.

        After wrong input, or an error that no other start mends, the next start counts anew:
        somebody has mended the cause.
        """
        seconds = time.monotonic() - self._began
        self._starts[-1] = replace(self._starts[-1], code=code, seconds=seconds, reason=reason)
        final = code in (EXIT_WRONG_INPUT, EXIT_GAVE_UP)
        self._write(gave_up=final)
        return "" if final or code == EXIT_PREEMPTED else self._why(self._now())

    def clear(self) -> None:
        """Delete the record: the job has succeeded."""
        self._store.delete(self._name)

    def _now(self) -> int:
        best = self._starts[-1].progress if self._starts else 0
        return max(best, self._progress.read())

    def _why(self, now: int) -> str:
        """Why no other start would help; then the record says that the job has given up."""
        failed, idle = failed_starts(self._starts, now), idle_seconds(self._starts, now)
        where = self._progress.describe(now)
        if len(failed) > self._retries:
            count = f"{len(failed)} failure{'s' * (len(failed) > 1)}"
            what = f"{count}{where} since {_clock(failed[0].time)}"
            more = f"retries, now {self._retries}"
        elif idle > self._stall_hours * _HOUR:
            what = f"its starts ran {idle / _HOUR:.1f} h{where} and came no further"
            more = f"stall_hours, now {self._stall_hours:g}"
        else:
            return ""
        self._write(gave_up=True)
        ended = [start for start in self._starts if start.code != EXIT_PREEMPTED]
        last = (ended or self._starts)[-1]
        reason = last.reason or "none was left: a lost node, or killed with all its processes"
        return f"{what}; last error: {reason} ({more}, in the run file or as a flag, allows more)"

    def _write(self, gave_up: bool = False) -> None:
        body = {"starts": to_json(self._starts), "gave_up": gave_up}
        self._store.put(self._name, canonical_json(body))


def read_attempts(store: Store, name: str) -> int:
    """How many starts of a job are on record."""
    starts, _ = _read(store, _file(name))
    return starts[-1].attempt if starts else 0


def _file(name: str) -> str:
    return f"{name}{STARTS}"


def _read(store: Store, file: str) -> tuple[list[Start], bool]:
    """The recorded starts, and if the job gave up after them."""
    try:
        body = json.loads(store.get(file))
        return [from_json(Start, row) for row in body["starts"]], bool(body["gave_up"])
    except AbsentError:
        return [], False
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        LOG.warning("%s/%s is damaged; counting anew: %s", store.url, file, error)
        return [], False


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
