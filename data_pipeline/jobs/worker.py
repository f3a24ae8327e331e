"""One worker of a job: tasks that any number of workers share, then one finisher.

    <prefix>_done/<task>.json     the record of a finished task (ledger.py); put last
    <prefix>_ledger/, _leases/    while the job runs (ledger.py, leases.py)
    job.json                      kind and size of the job, for `tapir status`

Every worker has the same list of tasks. It starts with its own and continues with all that remain,
including those of dead workers. Workers may be killed and restarted, in duplicate or with another
count: a task with a marker is never made again. Leases only save time: `make` names its outputs by
their inputs and puts them if absent, so that two workers may make one task. One worker ends the job
(finish.py).
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from core.errors import AbsentError, CorruptError
from core.files.atomic import canonical_json
from core.keys import keyed_rng
from core.log import LOG
from core.storage.store import Store
from core.workers import JobWorker
from data_pipeline.formats.manifest import read_json
from data_pipeline.jobs.finish import Finisher
from data_pipeline.jobs.leases import Leases, Pace
from data_pipeline.jobs.ledger import DONE, Ledger, Record, done_tasks
from data_pipeline.jobs.status import JOB

_REFUSED = 8
"""Tasks of other workers that are tried before the next look at what is done."""
_LISTING = 0.05
"""Maximum fraction of the time that is spent on listing what is done."""


@contextmanager
def _modules_uncollected() -> Iterator[None]:
    """The garbage collector leaves out what there is already: it took 3% of packing (perf)."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One unit of work; the same for every worker."""

    prefix: str = ""
    """Folder of its marker and lease, with a slash at its end; "" is the root of the store."""
    name: str
    """Digest of its inputs and of all settings that change its outputs."""
    shown: str
    """For logs and `tapir status`."""
    size: int = 0
    """Pairs; 0 if nobody knows before it is made."""

    @property
    def marker(self) -> str:
        """Name of the object that marks it as done."""
        return f"{self.prefix}{DONE}{self.name}.json"


AnyTask = TypeVar("AnyTask", bound=Task)
Progress = dict[str, Any]
"""What a lease publishes of a running task: `pairs` counts those that are done."""


@dataclass(frozen=True, kw_only=True)
class Work(Generic[AnyTask]):
    """How the tasks of a job are made."""

    make: Callable[[AnyTask, Progress], Record]
    """Write a task's outputs, put if absent; count `pairs` in the progress; return the record."""
    judge: Callable[[AnyTask, Record], None] = lambda task, record: None
    """Called when a task made here is marked as done; raises InputError to end this worker."""


class Job(Generic[AnyTask]):
    """The tasks of a job, as one worker sees them."""

    def __init__(
        self, store: Store, tasks: Sequence[AnyTask], member: JobWorker, seconds: float
    ) -> None:
        """`seconds`: a lease that is not renewed for as long is taken over."""
        self.store, self.tasks, self._member, self._seconds = store, tasks, member, seconds
        self._pace = Pace()
        self._leases: dict[str, Leases] = {}
        self._ledgers: dict[str, Ledger] = {}

    @property
    def own(self) -> Sequence[AnyTask]:
        """The tasks that this worker starts with."""
        return self.tasks[self._member.number :: self._member.count]

    def leases(self, prefix: str) -> Leases:
        """The leases of a folder."""
        if prefix not in self._leases:
            self._leases[prefix] = Leases(
                self.store, prefix, self._seconds, self._member, self._pace
            )
        return self._leases[prefix]

    def finisher(self, prefix: str, result: str, write: Callable[[], bool]) -> Finisher:
        """The end of a folder's tasks: `write` writes the object `result` last."""
        return Finisher(self.store, prefix, self.leases(prefix), result, write)

    def announce(self, kind: str, finishers: Sequence[Finisher], earlier: int = 0) -> None:
        """Write job.json for `tapir status`; `earlier`: tasks of each folder's earlier versions."""
        parts = {
            finisher.prefix or "all": {
                "prefix": finisher.prefix,
                "result": finisher.result,
                "tasks": earlier + sum(task.prefix == finisher.prefix for task in self.tasks),
                "pairs": 0 if earlier else self._known_pairs(finisher.prefix),
            }
            for finisher in finishers
        }
        self.store.put(JOB, canonical_json({"job": kind, "parts": parts}))

    def run(self, work: Work[AnyTask], finishers: Sequence[Finisher], again: bool = False) -> int:
        """Make unfinished tasks, then the results; returns how many were made here.

        With `again`, worker 0 writes the results again.
        Raises: what `work` and the finishers raise.
        """
        made = 0
        again = again and self._member.number == 0
        with _modules_uncollected():
            while again or not all(finisher.finished() for finisher in finishers):
                made += self._make_open(work)
                whole = all(finisher.finish(again) for finisher in finishers)
                again = again and not whole
        for finisher in finishers:
            finisher.sweep()
        return made

    def repair(
        self,
        check: Callable[[AnyTask, Record], None],
        outputs: Callable[[AnyTask], Sequence[str]],
        finishers: Sequence[Finisher],
    ) -> None:
        """Take back this worker's damaged tasks, so that `run` makes them again.

        `check` raises AbsentError, CorruptError or an error of a malformed record; `outputs` names
        the objects that are deleted beside the result and the marker.
        """
        done = {prefix: done_tasks(self.store, prefix) for prefix in self._prefixes()}
        results = {finisher.prefix: finisher.result for finisher in finishers}
        for task in self.own:
            if task.name not in done[task.prefix]:
                continue
            try:
                check(task, read_json(self.store, task.marker))
            except (AbsentError, CorruptError, ValueError, KeyError, TypeError) as error:
                LOG.info("%s%s is damaged, and is made again: %s", task.prefix, task.name, error)
                for name in (results[task.prefix], task.marker, *outputs(task)):
                    self.store.delete(name)

    def _make_open(self, work: Work[AnyTask]) -> int:
        """Make tasks until all have a marker; returns how many were made here."""
        made = passes = 0
        while True:
            began, before = time.monotonic(), made
            done = {prefix: done_tasks(self.store, prefix) for prefix in self._prefixes()}
            left = [task for task in self.tasks if task.name not in done[task.prefix]]
            if not left:
                return made
            now = time.monotonic()
            pause = max(self.leases(left[0].prefix).pause, (now - began) / _LISTING)
            refused, passes = 0, passes + 1
            for task in self._in_turn(left, passes):
                taken = self._take(task, work)
                made, refused = made + taken, refused + (not taken)
                if refused == _REFUSED or time.monotonic() > now + pause:
                    break
            if made == before:
                time.sleep(pause)

    def _in_turn(self, tasks: list[AnyTask], number: int) -> list[AnyTask]:
        """This worker's tasks, then those of the others in an order of its own."""
        own = {task.marker for task in self.own}
        mine = [task for task in tasks if task.marker in own]
        others = [task for task in tasks if task.marker not in own]
        order = keyed_rng(self._member.number, number, "steal").permutation(len(others))
        return mine + [others[i] for i in order]

    def _take(self, task: AnyTask, work: Work[AnyTask]) -> bool:
        """Make a task, unless another worker holds its lease or has made it."""
        leases = self.leases(task.prefix)
        lease = leases.claim(task.name)
        if lease is None:
            return False
        progress: Progress = {"shard": task.shown, "of": task.size, "pairs": 0}
        with leases.held(lease, progress):
            if self.store.exists(task.marker):
                return False
            record = work.make(task, progress)
            self._ledger(task.prefix).commit(task.name, record)
            work.judge(task, record)
        self._pace.pairs += progress["pairs"]
        LOG.info("worker %s: %s -> %s", self._member.text, task.shown, task.name[:12])
        return True

    def _ledger(self, prefix: str) -> Ledger:
        if prefix not in self._ledgers:
            self._ledgers[prefix] = Ledger(self.store, prefix, self._member.number)
        return self._ledgers[prefix]

    def _prefixes(self) -> list[str]:
        return sorted({task.prefix for task in self.tasks})

    def _known_pairs(self, prefix: str) -> int:
        """Pairs of a folder's tasks; 0 if those of one are not known."""
        sizes = [task.size for task in self.tasks if task.prefix == prefix]
        return sum(sizes) if all(sizes) else 0
