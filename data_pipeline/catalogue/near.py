"""Pairs of perceptual hashes within a few bits of each other, without comparing all with all.

Two hashes of four bands that differ in at most three bits agree in a band, so only hashes with an
equal band are compared. A band value that more than RUN hashes share is cut further: the other 96
bits have four parts of 24, and a pair with at most three differences agrees in one of them, too.
Nothing is lost up to here. The rule for what is still crowded: of more than CROWD hashes that agree
in all 56 bits, each is compared with the next CROWD in the order of the hashes; pairs that are
further apart are counted in `Crowded` and not compared in this band.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.images.decode import BAND_BITS, BANDS, FLAT_BITS, FLAT_LOOKS

Words = NDArray[np.uint64]
Indices = NDArray[np.int64]
MOST_NEAR = BANDS - 1
"""Two hashes that differ in at most this many bits agree in at least one band."""
RUN = 32
"""Hashes with an equal band that are compared without cutting them further."""
CROWD = 4096
"""Hashes that one is compared with, at most, among those that agree in 56 bits."""
Edges = NDArray[np.uint64]
"""Two rows whose hashes differ in 0 to 3 bits: later << 33 | earlier << 2 | bits (`edges_of`)."""
MOST_ROWS = 2**31
_LATER, _EARLIER, _BITS = np.uint64(33), np.uint64(2), np.uint64(MOST_NEAR)
_PART_BYTES, _PARTS = 3, 4
_PART_BITS = np.uint64(8 * _PART_BYTES)
_TOGETHER = 2**20


@dataclass(kw_only=True)
class Crowded:
    """What the cap left out."""

    values: int = 0
    """Values of 56 bits that more than CROWD hashes share, over all bands and parts."""
    hashes: int = 0
    """Hashes that have them."""
    skipped: int = 0
    """Comparisons that were not made."""

    def add(self, other: "Crowded") -> None:
        """Add another band's or partition's."""
        self.values += other.values
        self.hashes += other.hashes
        self.skipped += other.skipped


def bands_of(looks: Words, band: int) -> Words:
    """One band of each hash. Shapes: (n, 2) -> (n,); values below 2**BAND_BITS."""
    word = looks[:, band * BAND_BITS // 64]
    return (word >> np.uint64(band * BAND_BITS % 64)) & np.uint64(2**BAND_BITS - 1)


def is_flat(looks: Words) -> NDArray[np.bool_]:
    """Hashes of nearly flat pictures. Shapes: (n, 2) -> (n,)."""
    flat = np.zeros(len(looks), np.bool_)
    for first, second in np.frombuffer(b"".join(FLAT_LOOKS), "<u8").reshape(-1, 2):
        bits = np.bitwise_count(looks[:, 0] ^ first) + np.bitwise_count(looks[:, 1] ^ second)
        flat |= bits <= FLAT_BITS
    return flat


def near_edges(
    looks: Words, rows: NDArray[np.uint32], band: int, most: int
) -> tuple[Edges, Crowded]:
    """Rows of hashes that agree in a band and differ in at most `most` bits.

    Shapes: looks (n, 2), all different; rows (n,). Returns sorted edges; a pair that agrees in
    several bands is in the result of each.
    """
    values = bands_of(looks, band)
    members = np.argsort(values)
    values = values[members]
    sizes, _ = _runs(values)
    few = (sizes > 1) & (sizes <= RUN)
    edges = [*_compared(looks, rows, members[few], values[few], most, RUN)]
    many = sizes > RUN
    members, values = members[many], values[many]
    crowded = Crowded()
    for part in _other_parts(looks[members], band):
        edges += _cut_further(looks, rows, members, values << _PART_BITS | part, most, crowded)
    return distinct(np.concatenate([np.empty(0, np.uint64), *edges])), crowded


def _cut_further(
    looks: Words,
    rows: NDArray[np.uint32],
    members: Indices,
    values: Words,
    most: int,
    crowded: Crowded,
) -> Iterator[Edges]:
    """Edges of hashes that agree in 56 bits, the `values`; counts those that the cap leaves out."""
    order = np.argsort(values)
    members, values = members[order], values[order]
    sizes, _ = _runs(values)
    few = (sizes > 1) & (sizes <= CROWD)
    yield from _compared(looks, rows, members[few], values[few], most, CROWD)
    many = sizes > CROWD
    members, values = members[many], values[many]
    order = np.lexsort((looks[members, 1], looks[members, 0], values))
    members, values = members[order], values[order]
    yield from _compared(looks, rows, members, values, most, CROWD)
    sizes, ends = _runs(values)
    crowded.values += int((1 / sizes).sum().round()) if len(sizes) else 0
    crowded.hashes += len(sizes)
    crowded.skipped += int(np.maximum(ends - np.arange(len(ends)) - 1 - CROWD, 0).sum())


def _compared(
    looks: Words,
    rows: NDArray[np.uint32],
    members: Indices,
    values: Words,
    most: int,
    ahead: int,
) -> Iterator[Edges]:
    """Compare each member with the next `ahead` of its run of equal values."""
    _, ends = _runs(values)
    first, second, numbers = looks[members, 0], looks[members, 1], rows[members]
    live = np.arange(len(members))
    for step in range(1, ahead + 1):
        live = live[live + step < ends[live]]
        if not len(live):
            return
        other = live + step
        bits = np.bitwise_count(first[live] ^ first[other])
        bits += np.bitwise_count(second[live] ^ second[other])
        near = bits <= most
        yield edges_of(numbers[live[near]], numbers[other[near]], bits[near])


def _runs(values: Words) -> tuple[Indices, Indices]:
    """Of each sorted value: the length of its run of equal ones, and where that ends."""
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    edges = np.concatenate([[0], changes, [len(values)]])
    lengths = np.diff(edges)
    return np.repeat(lengths, lengths), np.repeat(edges[1:], lengths)


def _other_parts(looks: Words, band: int) -> Iterator[Words]:
    """The bits outside of a band, in parts of 24. Shapes: (n, 2) -> 4 x (n,)."""
    own = BAND_BITS // 8
    data = np.ascontiguousarray(looks).view(np.uint8).reshape(len(looks), 2 * 8)
    rest = np.delete(data, np.s_[band * own : (band + 1) * own], 1).astype(np.uint64)
    for part in range(_PARTS):
        low, middle, high = rest[:, part * _PART_BYTES : (part + 1) * _PART_BYTES].T
        yield low | middle << np.uint64(8) | high << np.uint64(16)


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Sorted values, each once: `np.unique` hashes, which is slower (docs/LOG.md)."""
    values = np.sort(values, kind="stable")
    is_first = np.append(np.ones(min(len(values), 1), np.bool_), values[1:] != values[:-1])
    once: NDArray[Any] = values[is_first]
    return once


def edges_of(one: NDArray[Any], other: NDArray[Any], bits: NDArray[Any]) -> Edges:
    """Edges between rows, in either order; they sort by the later row, then by the earlier one."""
    later, earlier = np.maximum(one, other), np.minimum(one, other)
    edges: Edges = later.astype(np.uint64) << _LATER | earlier.astype(np.uint64) << _EARLIER
    return edges | bits.astype(np.uint64)


def ends_of(edges: Edges) -> tuple[Indices, Indices, NDArray[np.uint8]]:
    """(earlier rows, later rows, bits)."""
    earlier = edges >> _EARLIER & np.uint64(MOST_ROWS - 1)
    bits = (edges & _BITS).astype(np.uint8)
    return earlier.astype(np.int64), (edges >> _LATER).astype(np.int64), bits


def keep_first(edges: Edges, rows: int) -> Edges:
    """Decide in the order of rows: a row with an earlier, kept row near it is dropped.

    Shapes: sorted edges between `rows` rows -> one of them for each dropped row, to the earliest
    kept row near it.
    """
    dropped = bytearray(rows)
    chosen: list[Edges] = []
    for begin in range(0, len(edges), _TOGETHER):
        part = edges[begin : begin + _TOGETHER]
        places: list[int] = []
        earlier, later, _ = ends_of(part)
        for place, (one, other) in enumerate(zip(earlier.tolist(), later.tolist(), strict=True)):
            if not dropped[one] and not dropped[other]:
                dropped[other] = 1
                places.append(place)
        chosen.append(part[places])
    return np.concatenate([np.empty(0, np.uint64), *chosen])
