"""Which tasks of a job are done: a marker each, and ledgers that tell many in one read.

    <prefix>_done/<task>.json                the record of a task; put if absent: the first counts
    <prefix>_ledger/<worker>.<part>.json     the records of up to ROWS tasks of one worker

A worker rewrites the newest part of its ledger after each task. A task is done if its marker
exists; one without a line in a ledger (its worker was killed in between, or had an older version)
is read from its marker. A listing and a read of each part therefore tell everything.
"""

import json
import uuid
from collections.abc import Iterator
from typing import Any

from core.errors import AbsentError, CorruptError
from core.files.atomic import canonical_json, seal, unseal
from core.storage.store import Store
from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.manifest import read_json

DONE, LEDGER = "_done/", "_ledger/"
ROWS = 64
Record = dict[str, Any]
"""What is known of a finished task, as JSON. `tapir status` shows `pairs` and `rejects` by kind."""


class Ledger:
    """The tasks of one folder that this worker has finished."""

    def __init__(self, store: Store, prefix: str, worker: int = 0) -> None:
        """`worker`: its number, by which `tapir job` tells its progress from the others'."""
        self._store, self._prefix, self._name = store, prefix, f"{worker}-{uuid.uuid4().hex[:16]}"
        self._part, self._rows = 0, dict[str, Record]()

    def commit(self, task: str, record: Record) -> None:
        """Mark a task as done, unless another worker has; then its record counts."""
        marker = f"{self._prefix}{DONE}{task}.json"
        if not self._store.put(marker, canonical_json(record), if_absent=True):
            return
        self._rows[task] = record
        name = f"{self._prefix}{LEDGER}{self._name}.{self._part:06d}.json"
        self._store.put(name, seal({"rows": self._rows}))
        if len(self._rows) == ROWS:
            self._part, self._rows = self._part + 1, {}


def done_tasks(store: Store, prefix: str) -> set[str]:
    """The tasks whose markers exist."""
    start = len(prefix + DONE)
    return {name[start:].removesuffix(".json") for name in store.names(prefix + DONE)}


def finished_tasks(store: Store, prefix: str, ledgers: bool = True) -> Iterator[tuple[str, Record]]:
    """(task, record) of each finished task, in no order; without `ledgers` from the markers alone.

    Raises: CorruptError for a damaged marker; AbsentError for one deleted meanwhile.
    """
    left = done_tasks(store, prefix)
    if ledgers:
        parts = store.names(prefix + LEDGER)
        for rows in fetched(lambda name: _rows(store, name), parts):
            for task, record in rows.items():
                if task in left:
                    left.remove(task)
                    yield task, record
    rest = sorted(left)
    read = fetched(lambda task: read_json(store, f"{prefix}{DONE}{task}.json"), rest)
    yield from zip(rest, read, strict=True)


def sweep_ledgers(store: Store, prefix: str) -> None:
    """Delete the ledgers; the markers stay."""
    for name in store.names(prefix + LEDGER):
        store.delete(name)


def _rows(store: Store, name: str) -> dict[str, Record]:
    """The records of a part; none if it is damaged or gone: the markers have them."""
    try:
        rows = unseal(store.get(name), name)["rows"]
        return rows if isinstance(rows, dict) else {}
    except (AbsentError, CorruptError, KeyError, json.JSONDecodeError):
        return {}
