"""Raw shards, read as blocks of encoded pairs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from numpy.typing import NDArray

from core.keys import KeyPart, key_int
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.manifest import RAW
from data_pipeline.formats.shards import list_members
from data_pipeline.formats.split import SplitSource
from data_pipeline.images.crops import EXTENSIONS

Rows = slice | NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class RawRecord:
    """A stored pair; the picture is still encoded."""

    key: str
    image: bytes
    extension: str
    """png, jpg or webp."""
    caption: str
    """The first caption."""
    others: tuple[str, ...] = ()
    """Further captions of the picture."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions."""
        return (self.caption, *self.others)

    def drawn_caption(self, *key: KeyPart) -> str:
        """Sample one caption; equal keys give the same one."""
        if not self.others:
            return self.caption
        return self.captions[key_int(*key, self.id, "caption") % len(self.captions)]

    @property
    def id(self) -> int:
        """Hash of the key; identifies the pair in token records."""
        return key_int(self.key)


class RawRecords(Sequence[RawRecord]):
    """A batch of pairs, as the stream handles it."""

    def __init__(self, records: Sequence[RawRecord]) -> None:
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, place: int) -> RawRecord: ...
    @overload
    def __getitem__(self, place: slice) -> "RawRecords": ...
    def __getitem__(self, place: int | slice) -> "RawRecord | RawRecords":
        chosen = self._records[place]
        return chosen if isinstance(chosen, RawRecord) else RawRecords(chosen)

    def __iter__(self) -> Iterator[RawRecord]:
        return iter(self._records)

    def drawn(self, *key: KeyPart) -> "RawRecords":
        """The same records: who reads captions draws them, by step."""
        return self

    @staticmethod
    def gather(pieces: "Sequence[tuple[RawRecords, NDArray[Any], Rows]]") -> "RawRecords":
        """For each piece (records, places, rows), copy records[places] to rows of the result."""
        count = sum(len(places) for _, places, _ in pieces)
        gathered: list[Any] = [None] * count
        for records, places, rows in pieces:
            numbers = range(count)[rows] if isinstance(rows, slice) else rows.tolist()
            for row, place in zip(numbers, places.tolist(), strict=True):
                gathered[row] = records[place]
        return RawRecords(gathered)


class RawBuffer:
    """Collects the records of several blocks, filled by several threads."""

    def __init__(self, blocks: int) -> None:
        self._parts: list[Any] = [()] * blocks

    def put(self, block: int, records: RawRecords) -> None:
        """Store the records of one block."""
        self._parts[block] = records

    def records(self) -> RawRecords:
        """All records, in block order."""
        return RawRecords([record for part in self._parts for record in part])


class RawSource(SplitSource):
    """The pairs of one split."""

    kind = RAW

    def read(self, block: int, variant: int = 0) -> RawRecords:
        """Fetch one block.

        Raises: CorruptError, naming the shard, the offset and both digests.
        """
        return parse_pairs(self.blocks.read(block, variant))

    def buffer(self, sizes: NDArray[Any], free: RawBuffer | None = None) -> RawBuffer:
        """A buffer for blocks of these sizes; `free` is not needed."""
        return RawBuffer(len(sizes))

    def empty(self) -> RawRecords:
        """No records."""
        return RawRecords([])

    def member(self, key: str, name: str) -> str:
        """Where a pair's member is stored, for messages: SHARD, member NAME."""
        block, _ = find_pair(self._store, self._split, self.blocks, key)
        shard = self.blocks.shard_of(block).name
        return f"{self._store.url}/{self._split}/{shard}, member {name},"


def parse_pairs(tar: bytes) -> RawRecords:
    """Parse the pairs of a raw shard, or of a block of one."""
    pairs: dict[str, dict[str, bytes]] = {}
    for member in list_members(tar):
        key, _, extension = member.name.partition(".")
        pairs.setdefault(key, {})[extension] = tar[member.start : member.start + member.length]
    return RawRecords([_record(key, parts) for key, parts in pairs.items()])


def _record(key: str, parts: dict[str, bytes]) -> RawRecord:
    extension = next(name for name in EXTENSIONS if name in parts)
    caption, facts = parts["txt"].decode(), parts.get("json", b"")
    others = tuple(json.loads(facts)["captions"][1:]) if b'"captions"' in facts else ()
    return RawRecord(
        key=key, image=parts[extension], extension=extension, caption=caption, others=others
    )
