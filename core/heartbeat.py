"""Signs of life: each rank overwrites one small file that the supervisor reads.

Times are of the monotonic clock, which all processes of a machine share and nobody sets.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

SIZE = 256
FOLDER = "TAPIR_HEARTBEATS"
"""Environment variable with the folder that the files lie in."""
DIAGNOSE = "diagnose"
"""A file in that folder: every rank shall write down where it is."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank said last."""

    rank: int
    pid: int
    step: int
    """Steps that are done; -1 before training has begun."""
    doing: str
    """The phase, or the collective that it waits in."""
    time: float
    """Seconds of the monotonic clock."""


class Heart:
    """Writes this rank's file; does nothing where no supervisor listens."""

    def __init__(self, rank: int) -> None:
        folder = os.environ.get(FOLDER)
        self._rank, self._step = rank, -1
        path = _path(Path(folder), rank) if folder else None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600) if path else None

    def beat(self, doing: str, step: int | None = None) -> None:
        """Say what this rank does now; cheap enough for every step."""
        self._step = self._step if step is None else step
        if self._file is None:
            return
        text = (
            f'{{"rank":{self._rank},"pid":{os.getpid()},"step":{self._step},"doing":"{doing[:60]}"'
            f',"time":{time.monotonic()}}}'
        )
        os.pwrite(self._file, text.encode().ljust(SIZE), 0)


def read_beats(folder: Path, ranks: int) -> list[Beat]:
    """The last beats of the ranks that have spoken."""
    beats = []
    for rank in range(ranks):
        try:
            beats.append(Beat(**json.loads(_path(folder, rank).read_bytes())))
        except (OSError, ValueError, TypeError):
            continue  # not there yet, or half written: the next look sees it
    return beats


def _path(folder: Path, rank: int) -> Path:
    return folder / f"heart-{rank}"
