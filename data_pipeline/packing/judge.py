"""Too many unusable pairs end a job: judged for each unit over all workers, and at the end."""

import time
from collections.abc import Sequence

from core.errors import InputError
from core.storage.store import Store
from data_pipeline.jobs.ledger import Record, finished_tasks
from data_pipeline.packing.place import UNITS
from data_pipeline.packing.unit import UnitTask

LEAST = 1000
"""Pairs that are read before the whole set is estimated from them."""
_SECONDS = 60.0
"""Seconds between two looks at what the other workers have counted."""


def refuse_rejects(unusable: int, seen: int, most: float, first: str) -> None:
    """Raise InputError if more than the fraction `most` of the pairs is unusable."""
    if unusable > most * seen:
        raise InputError(
            f"{unusable} of {seen} pairs are unusable, more than max_rejects={most}; mend them, or "
            f"allow more with --max-rejects; the first: {first}"
        )


class Judge:
    """Counts the unusable pairs of all workers, and ends the job as soon as they are too many.

    They are too many if they exceed the fraction of the pairs that the whole set is expected to
    have: those read so far, by their bytes, for all bytes of the plan. If units of several kinds
    have sizes in bytes and in files, only the end of the job judges.
    """

    def __init__(self, store: Store, tasks: Sequence[UnitTask], most: float, alone: bool) -> None:
        self._store, self._most, self._alone = store, most, alone
        self._sizes = {task.name: task.bytes for task in tasks}
        self._comparable = len({unit.kind for task in tasks for unit in task.units}) == 1
        self._counted: dict[str, Record] = {}
        self._looked = time.monotonic()

    def judge(self, task: UnitTask, record: Record) -> None:
        """Raises: InputError if there are too many so far."""
        self._counted[task.name] = _counts(record)
        if not self._alone and time.monotonic() - self._looked > _SECONDS:
            done = finished_tasks(self._store, UNITS)
            own = ((name, _counts(record)) for name, record in done if name in self._sizes)
            self._counted.update(own)
            self._looked = time.monotonic()
        rows = self._counted.values()
        unusable, seen = (sum(row[name] for row in rows) for name in ("unusable", "pairs"))
        if seen < LEAST or not self._comparable:
            return
        read = sum(self._sizes.get(name, 0) for name in self._counted)
        expected = seen * sum(self._sizes.values()) / max(read, 1)
        first = next((row["first"] for row in rows if row["first"]), "")
        if unusable > self._most * expected:
            refuse_rejects(unusable, seen, self._most, first)


def _counts(record: Record) -> Record:
    return {name: record[name] for name in ("unusable", "pairs", "first")}
