"""What becomes of each row of a set, and the table of those that are left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.catalogue.near import Crowded
from data_pipeline.images.decode import LOOK_BITS

KEPT, REJECTED, KEY, DUPLICATE, NEAR = range(5)
"""What becomes of a row: kept, left out by its unit, or by the whole set; NEAR + n: near by n."""
KINDS = {KEY: "key", DUPLICATE: "duplicate", NEAR: "near-duplicate"}
LEFT_OUT = pa.schema(
    [
        pa.field("unit", pa.uint32(), False),
        pa.field("place", pa.uint32(), False),
        pa.field("key", pa.string(), False),
        pa.field("reject", pa.string(), False),
        pa.field("reason", pa.string(), False),
        pa.field("first_unit", pa.uint32()),
        pa.field("first_place", pa.uint32()),
    ]
)
"""Rows that the whole set leaves out, with the earlier row that each is like, if there is one."""


@dataclass(kw_only=True)
class Verdict:
    """What becomes of each row of some parts, numbered in order."""

    parts: Sequence[Path]
    """The units' parquet files."""
    units: NDArray[np.uint32]
    """The number of each part's unit."""
    starts: NDArray[np.int64]
    """The number of the first row of each part, and that of all rows."""
    kinds: NDArray[np.uint8]
    """KEPT, REJECTED, KEY, DUPLICATE or NEAR + bits, of each row."""
    firsts: NDArray[np.uint32]
    """The earlier row that a row which the set leaves out is like."""
    crowded: Crowded = field(default_factory=Crowded)
    """What the search for near duplicates did not compare."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows that the set leaves out, by kind."""
        numbers = np.bincount(np.minimum(self.kinds, NEAR), minlength=NEAR + 1)
        return {name: int(numbers[kind]) for kind, name in KINDS.items() if numbers[kind]}

    def masks(self, part: int) -> dict[str, NDArray[np.bool_]]:
        """Of each split in a part: which of its pairs, in order, are kept."""
        splits = read_part(self.parts[part], ["split"])["split"]
        kept = self._of_part(part) == KEPT
        return {
            name: kept[pc.equal(splits, name).fill_null(False).to_numpy()]
            for name in sorted(filter(None, splits.unique().to_pylist()))
        }

    def left_out(self) -> Iterator[pa.Table]:
        """The rows that the set leaves out, a LEFT_OUT table for each part that has some."""
        dropped = np.flatnonzero(self.kinds >= KEY)
        firsts = np.unique(self.firsts[dropped])
        keys = self._keys(firsts)
        for part in range(len(self.parts)):
            places = np.flatnonzero(self._of_part(part) >= KEY)
            if len(places):
                yield self._table(part, places, firsts, keys)

    def _of_part(self, part: int) -> NDArray[np.uint8]:
        return self.kinds[self.starts[part] : self.starts[part + 1]]

    def _keys(self, rows: NDArray[np.uint32]) -> pa.ChunkedArray:
        """The keys of sorted rows."""
        keys = []
        for part, (begin, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            low, high = np.searchsorted(rows, [begin, end])
            if high > low:
                column = read_part(self.parts[part], ["key"])["key"]
                keys += column.take(pa.array(rows[low:high] - begin)).chunks
        return pa.chunked_array(keys, pa.string())

    def _table(
        self,
        part: int,
        places: NDArray[np.int64],
        firsts: NDArray[np.uint32],
        keys: pa.ChunkedArray,
    ) -> pa.Table:
        table = read_part(self.parts[part], ["unit", "key", "source"]).take(pa.array(places))
        rows = places + self.starts[part]
        kinds, first = self.kinds[rows], self.firsts[rows]
        names = keys.take(pa.array(np.searchsorted(firsts, first)))
        home = np.searchsorted(self.starts, first, "right") - 1
        return pa.table(
            {
                "unit": table["unit"],
                "place": places.astype(np.uint32),
                "key": table["key"],
                "reject": [KINDS[min(kind, NEAR)] for kind in kinds.tolist()],
                "reason": _reasons(kinds, table["source"].to_pylist(), names.to_pylist()),
                "first_unit": self.units[home],
                "first_place": (first - self.starts[home]).astype(np.uint32),
            },
            LEFT_OUT,
        )


def _reasons(kinds: NDArray[np.uint8], sources: list[str], firsts: list[str]) -> list[str]:
    reasons = []
    for kind, source, first in zip(kinds.tolist(), sources, firsts, strict=True):
        if kind == KEY:
            reason = f"the key {first!r} ({source}) occurs twice; give it another name"
        elif kind == DUPLICATE:
            reason = f"the same pair as {first}"
        else:
            reason = f"{kind - NEAR} of {LOOK_BITS} bits from {first}"
        reasons.append(reason)
    return reasons


def read_part(path: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part of a catalogue."""
    with pq.ParquetFile(path) as file:
        return file.read(list(columns), use_threads=False)
