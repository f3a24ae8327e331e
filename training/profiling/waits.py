"""How long the trainer waits for its data."""

from collections import deque

import numpy as np

_KEPT = 10_000
"""Steps that the quantile is taken over."""


class Waits:
    """Waits of this rank, step by step."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=_KEPT)
        self._waited = self._spent = 0.0

    def add(self, waited: float, spent: float) -> None:
        """Note a step: seconds waited for its batch, and seconds of the whole step."""
        self._waits.append(waited)
        self._waited += waited
        self._spent += spent

    def row(self) -> dict[str, float]:
        """Figures for metrics.jsonl; data_share is of the time since the last row."""
        found = {
            "data_seconds": self._waits[-1],
            "data_share": self._waited / max(self._spent, 1e-9),
            "data_seconds_p999": float(np.quantile(self._waits, 0.999)),
        }
        self._waited = self._spent = 0.0
        return found
