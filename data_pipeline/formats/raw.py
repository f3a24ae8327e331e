"""Raw shards, read as blocks of encoded pairs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from core.errors import CorruptError
from core.keys import KeyPart, key_int
from data_pipeline.config import FilterConfig
from data_pipeline.formats.index import BlockReader
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.manifest import RAW
from data_pipeline.formats.shards import list_members
from data_pipeline.formats.split import SplitSource
from data_pipeline.formats.views.places import place_of
from data_pipeline.images.crops import EXTENSIONS
from data_pipeline.packing.filters import caption_reject
from data_pipeline.sources.pair import Pair
from data_pipeline.sources.tars import run_pairs
from data_pipeline.text.captions import clean_captions

_OF_CAPTIONS = ("boilerplate", "english", "min_words")
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
        """The same records, with all captions: the task samples one at each step."""
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
        return read_records(self.blocks, block)

    def buffer(self, sizes: NDArray[Any], free: RawBuffer | None = None) -> RawBuffer:
        """A buffer for blocks of these sizes; `free` is not needed."""
        return RawBuffer(len(sizes))

    def empty(self) -> RawRecords:
        """No records."""
        return RawRecords([])

    def member(self, key: str, name: str) -> str:
        """Where a pair's member is stored, for messages: SHARD, member NAME."""
        block, _ = find_pair(self._store, self._split, self.blocks, key)
        place = place_of(self._store, f"{self._split}/", self.blocks.shard_of(block))
        return f"{place}, member {name},"


def read_records(blocks: BlockReader, block: int) -> RawRecords:
    """Fetch a block's records; pairs that the mask leaves out are parsed and dropped.

    Raises: CorruptError, naming the shard, the offset and both digests.
    """
    shard, kept, data = blocks.shard_of(block), blocks.kept(block), blocks.read(block)
    stored: list[RawRecord | Pair]
    stored = [
        *(run_pairs(data, shard.place, shard.archive) if shard.archive else parse_pairs(data))
    ]
    count = int(blocks.records[block]) if kept is None else len(kept)
    if len(stored) != count:
        raise CorruptError(
            f"a block of {shard.shown} holds {len(stored)} pairs, its index says "
            f"{count}: another version wrote it; pack it again"
        )
    if kept is not None:
        stored = [stored[place] for place in np.flatnonzero(kept)]
    filters = _caption_filters(shard.captions)
    return RawRecords([r if isinstance(r, RawRecord) else _cleaned(r, filters) for r in stored])


def _cleaned(pair: Pair, filters: FilterConfig) -> RawRecord:
    """A pair of another program's tar as `pack` would have stored it."""
    captions = clean_captions(pair.caption, pair.where)
    kept = [caption for caption in captions if caption_reject(caption, filters) is None]
    first, *others = kept or captions
    return RawRecord(
        key=pair.key,
        image=pair.image,
        extension=pair.extension,
        caption=first,
        others=tuple(others),
    )


def caption_rules(filters: FilterConfig) -> str:
    """The caption filters as `Shard.captions` stores them; empty if there are none."""
    given = {name: getattr(filters, name) for name in _OF_CAPTIONS if getattr(filters, name)}
    return json.dumps(given, sort_keys=True) if given else ""


@lru_cache
def _caption_filters(rules: str) -> FilterConfig:
    return FilterConfig(**json.loads(rules or "{}"))


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
