"""A ring buffer file per rank with the times of its last steps.

A header of 512 bytes (padded JSON) is followed by RECORDS slots; step n is in slot n % RECORDS.
"""

import json
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.files.atomic import write_atomic
from core.log import LOG
from training.profiling.categories import CATEGORIES

RECORDS = 4096
"""Steps per file: 229 KB per rank."""
HEADER = 512
_MOST_STEPS = 2**40
"""A slot with a larger step number is damaged."""
FOLDER = "profile"
"""Folder in the run folder."""
_SLOT = struct.Struct(f"<qd{len(CATEGORIES)}f")
_TYPE = np.dtype([("step", "<i8"), ("time", "<f8"), ("seconds", "<f4", (len(CATEGORIES),))])


@dataclass(frozen=True, kw_only=True)
class RankSteps:
    """The content of a rank's file."""

    rank: int
    ranks: int
    """Number of ranks of the run."""
    stage: int
    """Pipeline stage."""
    steps: np.ndarray
    """(n,) int64, ascending."""
    times: np.ndarray
    """(n,) Unix time at the end of each step."""
    seconds: np.ndarray
    """(n, categories) float32."""


class Ring:
    """Writes one rank's file; on a failure training continues without it."""

    def __init__(self, out: Path, rank: int, ranks: int, stage: int, step: int) -> None:
        """Steps after `step`, written before a crash or rewind, are removed."""
        self._path = out / FOLDER / f"rank-{rank}.bin"
        facts = {"rank": rank, "ranks": ranks, "stage": stage, "categories": CATEGORIES}
        header = json.dumps(facts).encode().ljust(HEADER)
        self._file: int | None = None
        try:
            slots = self._kept(header, step)
            write_atomic(self._path, header + slots.tobytes())
            self._file = os.open(self._path, os.O_WRONLY)
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, seconds: Sequence[float]) -> None:
        """Write a step to its slot."""
        if self._file is None:
            return
        place = HEADER + step % RECORDS * _SLOT.size
        try:
            os.pwrite(self._file, _SLOT.pack(step, time.time(), *seconds), place)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _kept(self, header: bytes, step: int) -> np.ndarray:
        data = self._path.read_bytes() if self._path.exists() else b""
        if data[:HEADER] != header or len(data) != HEADER + RECORDS * _SLOT.size:
            return np.zeros(RECORDS, _TYPE)
        slots = np.frombuffer(data, _TYPE, offset=HEADER).copy()
        slots[slots["step"] > step] = 0
        return slots

    def _give_up(self, error: OSError) -> None:
        LOG.error("cannot write %s: %s; training goes on without it", self._path, error)
        self.close()


def read_rings(run: Path) -> list[RankSteps]:
    """Read all ranks' files; skips stale ones, whose number of ranks differs from rank 0's."""
    rings = [ring for path in (run / FOLDER).glob("rank-*.bin") if (ring := _read(path))]
    first = next((ring for ring in rings if ring.rank == 0), None)
    if first is None:
        return []
    return sorted((r for r in rings if r.ranks == first.ranks), key=lambda ring: ring.rank)


def _read(path: Path) -> RankSteps | None:
    """Read one file; None if it is damaged or of another version."""
    data = path.read_bytes()
    try:
        facts: dict[str, Any] = json.loads(data[:HEADER])
        rank, ranks, stage = (int(facts[name]) for name in ("rank", "ranks", "stage"))
        known = tuple(facts["categories"]) == CATEGORIES and 0 <= rank < ranks
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    if not known or len(data) != HEADER + RECORDS * _SLOT.size:
        return None
    slots = np.frombuffer(data, _TYPE, offset=HEADER)
    steps, seconds = slots["step"], slots["seconds"]
    in_place = (steps > 0) & (steps < _MOST_STEPS) & (steps % RECORDS == np.arange(RECORDS))
    slots = slots[in_place & (np.isfinite(seconds) & (seconds >= 0)).all(1)]
    slots = np.sort(slots, order="step")
    return RankSteps(
        rank=rank,
        ranks=ranks,
        stage=stage,
        steps=slots["step"],
        times=slots["time"],
        seconds=slots["seconds"],
    )
