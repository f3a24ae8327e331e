"""Heartbeats: each rank overwrites one small file that the supervisor reads.

Times are those of the monotonic clock, which all processes of a machine share.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

SIZE = 256
FOLDER = "TAPIR_HEARTBEATS"
"""Environment variable: the folder of the heartbeat files."""
DIAGNOSE = "diagnose"
"""A file in that folder: asks every rank to write its stacks and last collectives."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The last heartbeat of a rank."""

    rank: int
    pid: int
    step: int
    """Steps that are done; -1 before training has begun."""
    doing: str
    """The phase, or the collective that it waits in."""
    time: float
    """Seconds of the monotonic clock."""


class Heart:
    """Writes this rank's heartbeat file; a no-op without a supervisor."""

    def __init__(self, rank: int) -> None:
        folder = os.environ.get(FOLDER)
        self._rank, self._step = rank, -1
        path = _path(Path(folder), rank) if folder else None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600) if path else None

    def beat(self, doing: str, step: int | None = None) -> None:
        """Record what this rank does now; cheap enough for every step."""
        self._step = self._step if step is None else step
        if self._file is None:
            return
        text = (
            f'{{"rank":{self._rank},"pid":{os.getpid()},"step":{self._step},"doing":"{doing[:60]}"'
            f',"time":{time.monotonic()}}}'
        )
        os.pwrite(self._file, text.encode().ljust(SIZE), 0)


def read_beats(folder: Path, ranks: int) -> list[Beat]:
    """The last heartbeats of the ranks that have written one."""
    beats = []
    for rank in range(ranks):
        try:
            beats.append(Beat(**json.loads(_path(folder, rank).read_bytes())))
        except (OSError, ValueError, TypeError):
            continue  # missing or half written: the next poll reads it
    return beats


def _path(folder: Path, rank: int) -> Path:
    return folder / f"heart-{rank}"
