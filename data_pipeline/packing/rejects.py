"""Pairs that `tapir pack` rejects, and the keys that it has accepted."""

import json
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from core.keys import key_int
from core.storage.store import Store
from data_pipeline.sources.pair import IGNORED, METADATA, Unusable

REJECTS = "rejects/"
_REJECTS_TOGETHER = 100_000
_NEW_KEYS = 1_000_000


class Rejects:
    """Records rejected pairs and writes them in parts."""

    def __init__(self, store: Store, most: float) -> None:
        """`most` is the maximum fraction of unusable pairs."""
        self._store, self._most = store, most
        self._lines: list[str] = []
        self.parts = 0
        self.kinds: Counter[str] = Counter()
        self.unusable = 0
        self.first = ""

    def add(self, reject: Unusable, asked: bool = False) -> None:
        """Record a reject; `asked` is True if a filter rejected it.

        Raises: InputError if it is unusable and max_rejects is 0.
        """
        if not asked and reject.kind not in (IGNORED, METADATA):
            if self._most == 0:
                raise InputError(
                    f"{reject.reason}; to leave unusable pairs out and count them, pass "
                    "--max-rejects 0.01"
                )
            self.unusable += 1
            self.first = self.first or reject.reason
        self.kinds[reject.kind] += 1
        self._lines.append(json.dumps(vars(reject)) + "\n")
        if len(self._lines) == _REJECTS_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write the collected rejects as a part."""
        self._store.put(self.part(self.parts), "".join(self._lines).encode())
        self._lines, self.parts = [], self.parts + 1

    def part(self, number: int) -> str:
        """File name of a part."""
        return f"{REJECTS}{number:06d}.jsonl"


class Keys:
    """A set of key ids in 8 bytes each: sorted arrays, and a Python set of the newest."""

    def __init__(self) -> None:
        self._new: set[int] = set()
        self._old: list[NDArray[np.uint64]] = []

    def add(self, key: str) -> bool:
        """Add a key; False if its id is already present."""
        name = key_int(key)
        if name in self._new or any(_holds(ids, name) for ids in self._old):
            return False
        self._new.add(name)
        if len(self._new) >= _NEW_KEYS:
            self._fold()
        return True

    def _fold(self) -> None:
        """Move the newest ids to a sorted array, merged with arrays that are no longer than it."""
        ids = np.sort(np.fromiter(self._new, np.uint64, len(self._new)))
        while self._old and len(self._old[-1]) <= len(ids):
            ids = np.sort(np.concatenate([self._old.pop(), ids]), kind="stable")
        self._old.append(ids)
        self._new.clear()


def _holds(ids: NDArray[np.uint64], name: int) -> bool:
    at = int(np.searchsorted(ids, np.uint64(name)))
    return at < len(ids) and int(ids[at]) == name
