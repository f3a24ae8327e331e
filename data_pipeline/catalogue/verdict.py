"""What becomes of each row of a set, and the table of those that are left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.errors import InputError
from data_pipeline.catalogue.near import MOST_ROWS, Crowded, distinct
from data_pipeline.catalogue.schema import SCHEMA
from data_pipeline.formats.fetch import fetched
from data_pipeline.images.decode import LOOK_BITS

_THREADS = 2
"""That read parts."""
KEPT, REJECTED, KEY, DUPLICATE, CONDITION, NEAR = range(6)
"""What becomes of a row: it is kept, was left out before (by its unit, or by the set of which this
one is a view), or is left out now; NEAR + n: near an earlier one by n bits."""
KINDS = {
    KEY: "key",
    DUPLICATE: "duplicate",
    CONDITION: "condition",
    NEAR: "near-duplicate",
}
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
    """The number of each part's unit; any for an empty one."""
    starts: NDArray[np.int64]
    """The number of the first row of each part, and that of all rows."""
    kinds: NDArray[np.uint8]
    """KEPT, REJECTED, ..., NEAR + bits, of each row."""
    firsts: NDArray[np.uint32]
    """The earlier row that a duplicate is like."""
    condition: str = ""
    """What the rows of the kind CONDITION do not fulfil."""
    crowded: Crowded = field(default_factory=Crowded)
    """What the search for near duplicates did not compare."""

    @classmethod
    def all_kept(cls, parts: Sequence[Path], condition: str = "") -> "Verdict":
        """Nothing is left out yet; reads the parts' counts.

        Raises: InputError for more than MOST_ROWS rows.
        """
        facts = np.array(list(fetched(_unit_and_rows, parts)), np.int64).reshape(-1, 2)
        starts = np.cumsum([0, *facts[:, 1]])
        rows = int(starts[-1])
        if rows > MOST_ROWS:
            raise InputError(f"{rows} pairs are more than {MOST_ROWS}; make several sets of them")
        return cls(
            parts=parts,
            units=facts[:, 0].astype(np.uint32),
            starts=starts,
            kinds=np.zeros(rows, np.uint8),
            firsts=np.zeros(rows, np.uint32),
            condition=condition,
        )

    def rows_of(self, units: NDArray[np.uint32], places: NDArray[np.uint32]) -> NDArray[np.int64]:
        """The numbers of rows."""
        some = np.flatnonzero(np.diff(self.starts))
        first = np.zeros(int(self.units.max(initial=0)) + 1, np.int64)
        first[self.units[some]] = self.starts[some]
        numbers: NDArray[np.int64] = first[units] + places
        return numbers

    @property
    def counts(self) -> dict[str, int]:
        """Rows that the set leaves out, by kind."""
        kinds = np.minimum(self.kinds, NEAR)
        numbers = np.bincount(kinds, minlength=NEAR + 1)
        return {name: int(numbers[kind]) for kind, name in KINDS.items() if numbers[kind]}

    def masks(self, part: int) -> dict[str, NDArray[np.bool_]]:
        """Of each split in a part: which of its pairs, in order, are kept."""
        splits = read_part(self.parts[part], ["split"])["split"]
        kept = self.of_part(part) == KEPT
        return {
            name: kept[pc.equal(splits, name).fill_null(False).to_numpy()]
            for name in sorted(filter(None, splits.unique().to_pylist()))
        }

    def left_out(self) -> Iterator[pa.Table]:
        """The rows that the set leaves out, a LEFT_OUT table for each part that has some."""
        dropped = np.flatnonzero(self.kinds >= KEY)
        firsts = distinct(self.firsts[dropped])
        keys = self._keys(firsts)
        some = [part for part in range(len(self.parts)) if (self.of_part(part) >= KEY).any()]
        yield from fetched(lambda part: self._table(part, firsts, keys), some, _THREADS)

    def of_part(self, part: int) -> NDArray[np.uint8]:
        """The kinds of a part's rows."""
        return self.kinds[self.starts[part] : self.starts[part + 1]]

    def _keys(self, rows: NDArray[np.uint32]) -> pa.Array:
        """The keys of sorted rows, in one array: `take` copies the chunks of several each time."""
        bounds = np.searchsorted(rows, self.starts)

        def keys_of(part: int) -> list[pa.Array]:
            column = read_part(self.parts[part], ["key"])["key"]
            places = rows[bounds[part] : bounds[part + 1]] - self.starts[part]
            return list(column.take(pa.array(places)).chunks)

        some = np.flatnonzero(np.diff(bounds)).tolist()
        keys = [chunk for chunks in fetched(keys_of, some, _THREADS) for chunk in chunks]
        return pa.chunked_array(keys, pa.string()).cast(pa.large_string()).combine_chunks()

    def _table(self, part: int, firsts: NDArray[np.uint32], keys: pa.Array) -> pa.Table:
        places = np.flatnonzero(self.of_part(part) >= KEY)
        table = read_part(self.parts[part], ["unit", "key", "source"]).take(pa.array(places))
        rows = places + self.starts[part]
        kinds, first = self.kinds[rows], self.firsts[rows]
        names = keys.take(pa.array(np.searchsorted(firsts, first))).to_pylist()
        home = np.searchsorted(self.starts, first, "right") - 1
        alone = kinds == CONDITION
        reasons = map(self._reason, kinds.tolist(), table["source"].to_pylist(), names)
        return pa.table(
            {
                "unit": table["unit"],
                "place": places.astype(np.uint32),
                "key": table["key"],
                "reject": [KINDS[min(kind, NEAR)] for kind in kinds.tolist()],
                "reason": list(reasons),
                "first_unit": pa.array(self.units[home], mask=alone),
                "first_place": pa.array((first - self.starts[home]).astype(np.uint32), mask=alone),
            },
            LEFT_OUT,
        )

    def _reason(self, kind: int, source: str, first: str) -> str:
        if kind == KEY:
            return f"the key {first!r} ({source}) occurs twice; give it another name"
        if kind == DUPLICATE:
            return f"the same pair as {first}"
        if kind == CONDITION:
            return f"not {self.condition}"
        return f"{kind - NEAR} of {LOOK_BITS} bits from {first}"


def _unit_and_rows(path: Path) -> tuple[int, int]:
    """From the end of a part: the number of its unit, and of its rows."""
    facts = pq.read_metadata(path)
    if not facts.num_rows:
        return 0, 0
    group = facts.row_group(0)
    return int(group.column(SCHEMA.get_field_index("unit")).statistics.min), facts.num_rows


def is_kept_by_unit(table: pa.Table) -> NDArray[np.bool_]:
    """Rows that a block holds and their unit has kept; `table` has `split` and `reject`."""
    kept = pc.and_(pc.is_valid(table["split"]), pc.is_null(table["reject"]))
    mask: NDArray[np.bool_] = kept.to_numpy()
    return mask


def read_part(path: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part of a catalogue."""
    with pq.ParquetFile(path) as file:
        return file.read(list(columns), use_threads=False)
