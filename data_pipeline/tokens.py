"""Token records: image codes and text ids of pairs, stored as blocks inside of tar shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from core.errors import CorruptError
from core.store import Store
from data_pipeline.cache import BlockCache
from data_pipeline.index import BlockReader
from data_pipeline.manifest import TOKENS, read_manifest

_MAGIC = b"TPRB\x01\x00\x00\x00"


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """The tokens of one pair."""

    id: int
    """The pair's id, a hash of its key."""
    image: NDArray[np.uint16]
    """Codes in raster order, (grid * grid,)."""
    text: NDArray[np.uint16]
    """All text ids, untruncated."""


class TokenRecords(Sequence[TokenRecord]):
    """Some records as arrays: a batch costs a few copies, whatever its size.

    ids (n,), image (n, grid * grid), text: those of record i are text[ends[i] : ends[i + 1]].
    """

    def __init__(
        self,
        ids: NDArray[np.uint64],
        image: NDArray[np.uint16],
        text: NDArray[np.uint16],
        ends: NDArray[np.int64],
    ) -> None:
        self.ids, self.image, self.text, self.ends = ids, image, text, ends

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
            return TokenRecords(
                self.ids[first:last],
                self.image[first:last],
                self.text,
                self.ends[first : last + 1],
            )
        i = range(len(self))[place]
        text = self.text[self.ends[i] : self.ends[i + 1]]
        return TokenRecord(id=int(self.ids[i]), image=self.image[i], text=text)

    def __iter__(self) -> Iterator[TokenRecord]:
        return (self[i] for i in range(len(self)))

    def take(self, places: Any) -> "TokenRecords":
        """The records at some places, in that order."""
        lengths = np.diff(self.ends)[places]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.ends[:-1][places] - ends[:-1], lengths)
        text = self.text[shift + np.arange(ends[-1])]
        return TokenRecords(self.ids[places], self.image[places], text, ends)

    @staticmethod
    def join(parts: "Sequence[TokenRecords]") -> "TokenRecords":
        """Records in a row."""
        starts = np.cumsum([0, *(int(part.ends[-1] - part.ends[0]) for part in parts)])
        ends = [part.ends[1:] - part.ends[0] + at for part, at in zip(parts, starts, strict=False)]
        return TokenRecords(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.image for part in parts]),
            np.concatenate([part.text[part.ends[0] : part.ends[-1]] for part in parts]),
            np.concatenate([np.zeros(1, np.int64), *ends]),
        )

    @staticmethod
    def of(records: Sequence[TokenRecord]) -> "TokenRecords":
        """Arrays of single records.

        Raises: ValueError if there are none.
        """
        return TokenRecords(
            np.array([record.id for record in records], np.uint64),
            np.stack([record.image for record in records]).astype(np.uint16),
            np.concatenate([record.text for record in records]).astype(np.uint16),
            np.cumsum([0, *(len(record.text) for record in records)]),
        )


def encode_block(records: TokenRecords) -> bytes:
    """Lay out records: magic, n, image length, ids, offsets, image codes, text ids."""
    parts = [
        np.array(records.image.shape, "<u4"),
        records.ids.astype("<u8"),
        (records.ends - records.ends[0]).astype("<u4"),
        records.image.astype("<u2"),
        records.text[records.ends[0] : records.ends[-1]].astype("<u2"),
    ]
    return _MAGIC + b"".join(part.tobytes() for part in parts)


def decode_block(data: bytes) -> TokenRecords:
    """Read what `encode_block` wrote.

    Raises: CorruptError if this is no such block.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise CorruptError("these bytes are no block of token records")
    count, length = (int(x) for x in np.frombuffer(data, "<u4", 2, len(_MAGIC)))
    at = len(_MAGIC) + 8
    ids = np.frombuffer(data, "<u8", count, at)
    ends = np.frombuffer(data, "<u4", count + 1, at + 8 * count).astype(np.int64)
    at += 8 * count + 4 * (count + 1)
    image = np.frombuffer(data, "<u2", count * length, at).reshape(count, length)
    text = np.frombuffer(data, "<u2", int(ends[-1]), at + 2 * count * length)
    return TokenRecords(ids, image, text, ends)


class TokenSource:
    """The token records of one split."""

    def __init__(self, store: Store, split: str, cache: BlockCache | None = None) -> None:
        prefix = f"{split}/"
        self.manifest = read_manifest(store, prefix, TOKENS)
        self.blocks = BlockReader(store, prefix, self.manifest, cache)
        self.fingerprint = self.manifest.fingerprint
        self.sizes = self.blocks.records
        self.variants = self.manifest.variants

    def read(self, block: int, variant: int = 0) -> TokenRecords:
        """Fetch one block.

        Raises: CorruptError, naming the shard, the offset and both digests.
        """
        return decode_block(self.blocks.read(block, variant))

    def empty(self) -> TokenRecords:
        """No records."""
        image = np.zeros((0, self.manifest.facts["grid"] ** 2), np.uint16)
        nothing = np.zeros(0, np.uint16)
        return TokenRecords(np.zeros(0, np.uint64), image, nothing, np.zeros(1, np.int64))
