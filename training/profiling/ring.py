"""The last steps of each rank, in a small file that is written over and over.

A header of 512 bytes (JSON, padded) is followed by RECORDS slots; step n lies in slot n % RECORDS.
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
"""Steps that are kept: 229 KB a rank."""
HEADER = 512
_MOST_STEPS = 2**40
"""A slot with a larger number is damaged."""
FOLDER = "profile"
"""In the run folder."""
_SLOT = struct.Struct(f"<qd{len(CATEGORIES)}f")
_TYPE = np.dtype([("step", "<i8"), ("time", "<f8"), ("seconds", "<f4", (len(CATEGORIES),))])


@dataclass(frozen=True, kw_only=True)
class RankSteps:
    """What a rank's file holds."""

    rank: int
    ranks: int
    """Of the run that wrote it."""
    stage: int
    """Place in the pipeline."""
    steps: np.ndarray
    """(n,) int64, ascending."""
    times: np.ndarray
    """(n,) Unix seconds at which the steps were over."""
    seconds: np.ndarray
    """(n, categories) float32."""


class Ring:
    """Writes one rank's file; if that fails, training goes on without."""

    def __init__(self, out: Path, rank: int, ranks: int, stage: int, step: int) -> None:
        """Steps above `step`, written before a crash, are taken out."""
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
        """Put a step in its slot."""
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
    """The ranks' last steps, by rank; files of another number of ranks than rank 0's are old."""
    rings = [ring for path in (run / FOLDER).glob("rank-*.bin") if (ring := _read(path))]
    first = next((ring for ring in rings if ring.rank == 0), None)
    if first is None:
        return []
    return sorted((r for r in rings if r.ranks == first.ranks), key=lambda ring: ring.rank)


def _read(path: Path) -> RankSteps | None:
    """One file; None if it is none of this version, or damaged."""
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
