"""Pairs that `tapir pack` rejects, and how many of them a set may have."""

import json
from collections import Counter

from core.errors import InputError
from core.storage.store import Store
from data_pipeline.sources.pair import IGNORED, METADATA, Unusable

REJECTS = "rejects/"
WHOLE_SET = f"{REJECTS}set.jsonl"
"""Pairs that are left out for another pair of the set: duplicates."""


class Rejects:
    """Records the rejected pairs of one unit, or of a set that one process writes."""

    def __init__(self, store: Store, most: float, unit: int = 0) -> None:
        """`most` is the maximum fraction of unusable pairs."""
        self._store, self._most = store, most
        self._lines: list[str] = []
        self.name = f"{REJECTS}{unit:06d}.jsonl"
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

    def flush(self) -> None:
        """Write the rejects, if there are any."""
        if self._lines:
            self._store.put(self.name, "".join(self._lines).encode())
