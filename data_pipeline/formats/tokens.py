"""Token records: image codes and text ids of pairs, stored as blocks in tar shards.

    magic    TPRB, version 1 or 2
    sizes    records n, codes of an image, u32
    ids      n u64
    firsts   n + 1 u32, version 2 alone: record i has the texts firsts[i] ... firsts[i + 1] - 1
    ends     texts + 1 u32: text t has the ids ends[t] ... ends[t + 1] - 1
    image    codes, u16
    text     ids, u16

A block has version 1 if each of its records has one text, version 2 if some have several.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from core.errors import CorruptError
from core.keys import KeyPart, key_int
from data_pipeline.formats.manifest import TOKENS
from data_pipeline.formats.split import SplitSource

Rows = slice | NDArray[Any]
_MAGIC = {False: b"TPRB\x01\x00\x00\x00", True: b"TPRB\x02\x00\x00\x00"}
"""First bytes of a block, by whether a record has several texts."""


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """The tokens of one pair."""

    id: int
    """The pair's id, a hash of its key."""
    image: NDArray[np.uint16]
    """Codes in raster order, (grid * grid,)."""
    text: NDArray[np.uint16]
    """Ids of the first text, not truncated."""
    others: tuple[NDArray[np.uint16], ...] = ()
    """Ids of further texts of the picture."""

    @property
    def texts(self) -> tuple[NDArray[np.uint16], ...]:
        """All texts."""
        return (self.text, *self.others)


class TokenRecords(Sequence[TokenRecord]):
    """A batch of records as arrays, so that gathering takes a few copies at any size.

    ids (n,), image (n, grid * grid), text (total,): record i has text[ends[i] : ends[i + 1]].
    Stored records may have several texts: record i has those from firsts[i] to firsts[i + 1]. They
    are read one by one, or drawn before they are gathered.
    """

    def __init__(
        self,
        ids: NDArray[np.uint64],
        image: NDArray[np.uint16],
        text: NDArray[np.uint16],
        ends: NDArray[np.int64],
        firsts: NDArray[np.int64] | None = None,
    ) -> None:
        self.ids, self.image, self.text, self.ends = ids, image, text, ends
        self.firsts = firsts
        """First text of each record, (n + 1,); None if each has one."""

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> TokenRecord: ...
    @overload
    def __getitem__(self, place: slice) -> "TokenRecords": ...
    def __getitem__(self, place: int | slice) -> "TokenRecord | TokenRecords":
        if isinstance(place, slice):
            first, last, step = place.indices(len(self))
            if step != 1:
                return self.take(np.arange(first, last, step))
            last = max(first, last)
            rows = slice(first, last + 1)
            return TokenRecords(
                self.ids[first:last],
                self.image[first:last],
                self.text,
                self.ends[rows] if self.firsts is None else self.ends,
                None if self.firsts is None else self.firsts[rows],
            )
        i = range(len(self))[place]
        first, last = (i, i + 1) if self.firsts is None else self.firsts[i : i + 2].tolist()
        text, *others = (self.text[self.ends[t] : self.ends[t + 1]] for t in range(first, last))
        return TokenRecord(
            id=int(self.ids[i]), image=self.image[i], text=text, others=tuple(others)
        )

    def __iter__(self) -> Iterator[TokenRecord]:
        return (self[i] for i in range(len(self)))

    def take(self, places: NDArray[Any]) -> "TokenRecords":
        """The records at these places, in that order."""
        return TokenRecords.gather([(self, places, slice(0, len(places)))])

    def drawn(self, *key: KeyPart) -> "TokenRecords":
        """The records with one text each, sampled by key and id; equal keys give the same ones."""
        if self.firsts is None:
            return self
        texts = [
            record.texts[key_int(*key, record.id, "caption") % len(record.texts)] for record in self
        ]
        ends = np.cumsum([0, *map(len, texts)])
        return TokenRecords(self.ids, self.image, np.concatenate(texts), ends)

    @staticmethod
    def gather(pieces: "Sequence[tuple[TokenRecords, NDArray[Any], Rows]]") -> "TokenRecords":
        """For each piece (records, places, rows), copy records[places] to rows of the result.

        Raises: ValueError if a piece has several texts a record.
        """
        if any(records.firsts is not None for records, _, _ in pieces):
            raise ValueError("records of several texts are gathered after one text is drawn")
        count = sum(len(places) for _, places, _ in pieces)
        ids = np.empty(count, np.uint64)
        image = np.empty((count, pieces[0][0].image.shape[1]), np.uint16)
        texts: list[Any] = [b""] * count
        lengths = np.empty(count, np.int64)
        for records, places, rows in pieces:
            ids[rows] = records.ids[places]
            if isinstance(rows, slice):
                np.take(records.image, places, axis=0, out=image[rows], mode="clip")
            else:
                image[rows] = records.image[places]
            starts, stops = records.ends[places], records.ends[places + 1]
            lengths[rows] = stops - starts
            view = np.ascontiguousarray(records.text).data
            slices = [view[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
            numbers = range(count)[rows] if isinstance(rows, slice) else rows.tolist()
            for row, text in zip(numbers, slices, strict=True):
                texts[row] = text
        ends = np.zeros(count + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        return TokenRecords(ids, image, np.frombuffer(b"".join(texts), np.uint16), ends)

    @staticmethod
    def of(records: Sequence[TokenRecord]) -> "TokenRecords":
        """Stack single records.

        Raises: ValueError if there are none.
        """
        texts = [text for record in records for text in record.texts]
        return TokenRecords(
            np.array([record.id for record in records], np.uint64),
            np.stack([record.image for record in records]).astype(np.uint16),
            np.concatenate(texts).astype(np.uint16),
            np.cumsum([0, *map(len, texts)]),
            np.cumsum([0, *(len(record.texts) for record in records)])
            if len(texts) > len(records)
            else None,
        )


class TokenBuffer:
    """Preallocated arrays for the records of several blocks, filled by several threads."""

    def __init__(self, sizes: NDArray[Any], width: int, free: "TokenBuffer | None" = None) -> None:
        """Reuses the memory of `free` if it is large enough: page faults are slow."""
        self._starts = np.cumsum([0, *sizes])
        count = int(self._starts[-1])
        big_enough = free is not None and len(free.image) >= count
        self.image: NDArray[np.uint16]
        self.image = free.image if free and big_enough else np.empty((count, width), np.uint16)
        self._ids = np.empty(count, np.uint64)
        self._texts: list[Any] = [None] * len(sizes)
        self._ends: list[Any] = [None] * len(sizes)

    def put(self, block: int, records: TokenRecords) -> None:
        """Copy the records of one block to their place."""
        rows = slice(self._starts[block], self._starts[block + 1])
        self._ids[rows], self.image[rows] = records.ids, records.image
        self._texts[block], self._ends[block] = records.text.copy(), records.ends

    def records(self) -> TokenRecords:
        """All records, in block order."""
        at = np.cumsum([0, *map(len, self._texts)])
        parts = [ends[1:] + start for ends, start in zip(self._ends, at, strict=False)]
        text = np.concatenate(self._texts)
        ends = np.concatenate([np.zeros(1, np.int64), *parts])
        return TokenRecords(self._ids, self.image[: len(self._ids)], text, ends)


def encode_block(records: TokenRecords) -> bytes:
    """Serialise records, as at the head of this file."""
    ends, firsts = records.ends, records.firsts
    several = firsts is not None and int(firsts[-1] - firsts[0]) > len(records)
    if firsts is not None:
        ends = ends[firsts[0] : firsts[-1] + 1]
    parts = [
        np.array(records.image.shape, "<u4"),
        records.ids.astype("<u8"),
        *([(firsts - firsts[0]).astype("<u4")] if firsts is not None and several else []),
        (ends - ends[0]).astype("<u4"),
        records.image.astype("<u2"),
        records.text[ends[0] : ends[-1]].astype("<u2"),
    ]
    return _MAGIC[several] + b"".join(part.tobytes() for part in parts)


def decode_block(data: bytes) -> TokenRecords:
    """Parse the output of `encode_block`.

    Raises: CorruptError if the magic is missing.
    """
    several = data[: len(_MAGIC[True])] == _MAGIC[True]
    at = len(_MAGIC[several])
    if data[:at] != _MAGIC[several]:
        raise CorruptError("these bytes are not a block of token records")

    def numbers(kind: str, count: int) -> NDArray[Any]:
        nonlocal at
        array = np.frombuffer(data, kind, count, at)
        at += array.nbytes
        return array

    count, length = numbers("<u4", 2).tolist()
    ids = numbers("<u8", count)
    firsts = numbers("<u4", count + 1).astype(np.int64) if several else None
    texts = count if firsts is None else int(firsts[-1])
    ends = numbers("<u4", texts + 1).astype(np.int64)
    image = numbers("<u2", count * length).reshape(count, length)
    return TokenRecords(ids, image, numbers("<u2", int(ends[-1])), ends, firsts)


def codes_per_image(facts: Mapping[str, Any]) -> int:
    """Codes of an image by its facts: `grid` rows, and `columns` if it is not square."""
    return int(facts["grid"]) * int(facts.get("columns", facts["grid"]))


class TokenSource(SplitSource):
    """The token records of one split."""

    kind = TOKENS

    @property
    def _width(self) -> int:
        """Codes of an image."""
        return codes_per_image(self.manifest.facts)

    def read(self, block: int, variant: int = 0) -> TokenRecords:
        """Fetch one block.

        Raises: CorruptError, naming the shard, the offset and both digests.
        """
        return decode_block(self.blocks.read(block, variant))

    def buffer(self, sizes: NDArray[Any], free: TokenBuffer | None = None) -> TokenBuffer:
        """A buffer for blocks of these sizes, in the memory of `free` if it is large enough."""
        return TokenBuffer(sizes, self._width, free)

    def empty(self) -> TokenRecords:
        """No records."""
        image = np.zeros((0, self._width), np.uint16)
        nothing = np.zeros(0, np.uint16)
        return TokenRecords(np.zeros(0, np.uint64), image, nothing, np.zeros(1, np.int64))
