"""Follows a growing metrics.jsonl without rereading it."""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.run.config import config_of
from training.run.metrics import row_of

_PART = 2**20
_MOST_LOSSES = 20_000
_LARGEST = 1e100
"""Bound of losses that can be drawn."""
_RECENT = 20
"""Number of rows for the recent step time."""


class Tail:
    """Yields complete lines added since the last call; detects a replaced file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        """Device and inode of the file read last."""
        self._at = 0
        self.began_anew = False

    def lines(self) -> Iterator[str]:
        """New complete lines; a partial last line is read later."""
        self.began_anew = False
        try:
            with open(self._path, "rb") as file:
                facts = os.fstat(file.fileno())
                identity = facts.st_dev, facts.st_ino
                if identity != self._file or facts.st_size < self._at:
                    self.began_anew = self._file is not None
                    self._file, self._at = identity, 0
                yield from self._rest(file)
        except FileNotFoundError:
            return

    def _rest(self, file: Any) -> Iterator[str]:
        file.seek(self._at)
        pending = b""
        while part := file.read(_PART):
            *whole, pending = (pending + part).split(b"\n")
            for line in whole:
                self._at += len(line) + 1
                yield line.decode(errors="replace")


class Follower:
    """The state of a run, updated by `look`."""

    def __init__(self, run: Path) -> None:
        """Raises: InputError if it is not a run folder."""
        body = config_of(run)
        self.run, self.stage = run, str(body["stage"])
        self.steps: int = body["loop"]["steps"]
        self._tail = Tail(run / "metrics.jsonl")
        self._forget()

    def look(self) -> None:
        """Read the rows added since the last call."""
        for line in self._tail.lines():
            if self._tail.began_anew:
                self._forget()
                self._tail.began_anew = False
            self._take(line)

    @property
    def finished(self) -> bool:
        """True if the last step was trained and validated."""
        return self.last.get("step") == self.validation.get("step") == self.steps

    @property
    def gone(self) -> bool:
        """True if the run folder was deleted or moved."""
        return not self.run.is_dir()

    @property
    def seconds_a_step(self) -> float:
        """Recent step time, including its share of validation and saves if profiled."""
        seconds: list[float] = [
            sum(row["time"].values()) if "time" in row else row.get("seconds", 0)
            for row in self._recent
        ]
        return sum(seconds) / max(len(seconds), 1)

    @property
    def quiet(self) -> float:
        """Seconds since the last write."""
        try:
            return max(0.0, time.time() - (self.run / "metrics.jsonl").stat().st_mtime)
        except OSError:
            return 0.0

    def _forget(self) -> None:
        self.last: dict[str, Any] = {}
        """The last training row."""
        self.validation: dict[str, Any] = {}
        """The last validation row."""
        self.losses: deque[float] = deque(maxlen=_MOST_LOSSES)
        self.passed_over = 0
        """Number of invalid lines."""
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)

    def _take(self, line: str) -> None:
        row = row_of(line)
        if row is None:
            self.passed_over += 1
            return
        if row.get("split") == "validation":
            self.validation = row
            return
        self.last = row
        self._recent.append(row)
        loss = row.get("loss")
        if isinstance(loss, float) and math.isfinite(loss) and abs(loss) < _LARGEST:
            self.losses.append(loss)
