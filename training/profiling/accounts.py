"""Totals of a rank's time by category, and of its waits for data."""

from collections import deque
from typing import Any

import numpy as np

from parallel.ledger import PAIRS
from training.profiling.categories import BUBBLE, CATEGORIES, OF_GROUP, OTHER, PIPELINE
from training.profiling.clock import Operation, Owner

_KEPT = 10_000
"""Number of steps for the quantile of the waits."""
_INDEX = {name: i for i, name in enumerate(CATEGORIES)}


class Accounts:
    """Seconds by category of one rank, in total, since the last step and since the last row."""

    def __init__(self, stages: int) -> None:
        self._staged = stages > 1
        self._totals = [0.0] * len(CATEGORIES)
        self._at_step, self._at_row = list(self._totals), list(self._totals)
        self._operations: dict[tuple[str, str], float] = {}
        self._shortest: dict[Operation, float] = {}

    def add(self, owner: Owner, seconds: float) -> None:
        """Add an interval; split operations between pipeline stages into transfer and bubble."""
        if isinstance(owner, str):
            self._totals[_INDEX[owner]] += seconds
            return
        key = owner.group, owner.name
        self._operations[key] = self._operations.get(key, 0.0) + seconds
        if self._staged and (owner.group in ("pipeline", "world") or owner.name in PAIRS):
            transfer = min(self._shortest.get(owner, seconds), seconds)
            self._shortest[owner] = transfer
            self._totals[_INDEX[PIPELINE]] += transfer
            self._totals[_INDEX[BUBBLE]] += seconds - transfer
        else:
            self._totals[_INDEX[OF_GROUP.get(owner.group, OTHER)]] += seconds

    def forget(self) -> None:
        """Start over: time up to now belongs to no step and no row."""
        self.take_step()
        self.take_row()

    def take_step(self) -> list[float]:
        """Seconds by category since the last call."""
        spent = [now - then for now, then in zip(self._totals, self._at_step, strict=True)]
        self._at_step = list(self._totals)
        return spent

    def take_row(self) -> tuple[list[float], dict[str, dict[str, float]]]:
        """Seconds by category, and by group and operation, since the last `take_row`."""
        spent = [now - then for now, then in zip(self._totals, self._at_row, strict=True)]
        self._at_row = list(self._totals)
        operations: dict[str, dict[str, Any]] = {}
        for (group, name), seconds in self._operations.items():
            operations.setdefault(group, {})[name] = seconds
        self._operations = {}
        return spent, operations


class Waits:
    """The trainer's waits for data in each step."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=_KEPT)
        self._waited = self._spent = 0.0

    def add(self, waited: float, spent: float) -> None:
        """Add a step: seconds waited for its batch, and seconds of the whole step."""
        self._waits.append(waited)
        self._waited += waited
        self._spent += spent

    def row(self) -> dict[str, float]:
        """Figures for metrics.jsonl; data_wait_fraction covers the time since the last row."""
        row = {
            "data_wait_seconds": self._waits[-1],
            "data_wait_fraction": self._waited / max(self._spent, 1e-9),
            "data_wait_seconds_p999": float(np.quantile(self._waits, 0.999)),
        }
        self._waited = self._spent = 0.0
        return row
