"""Token records: image codes and text ids of a pair, stored as blocks inside of tar shards."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import CorruptError
from core.store import Store
from data_pipeline.manifest import TOKENS, read_manifest
from data_pipeline.shards import Member, read_index

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


def encode_block(records: list[TokenRecord]) -> bytes:
    """Lay out records: magic, n, image length, ids, offsets, image codes, text ids."""
    ends = np.cumsum([0, *(len(r.text) for r in records)]).astype("<u4")
    header = np.array([len(records), len(records[0].image)], "<u4")
    parts = [
        header,
        np.array([r.id for r in records], "<u8"),
        ends,
        np.stack([r.image for r in records]).astype("<u2"),
        np.concatenate([r.text for r in records]).astype("<u2"),
    ]
    return _MAGIC + b"".join(part.tobytes() for part in parts)


def decode_block(data: bytes) -> list[TokenRecord]:
    """Read what `encode_block` wrote."""
    count, length = (int(x) for x in np.frombuffer(data, "<u4", 2, len(_MAGIC)))
    at = len(_MAGIC) + 8
    ids = np.frombuffer(data, "<u8", count, at)
    ends = np.frombuffer(data, "<u4", count + 1, at + 8 * count)
    at += 8 * count + 4 * (count + 1)
    image = np.frombuffer(data, "<u2", count * length, at).reshape(count, length)
    text = np.frombuffer(data, "<u2", int(ends[-1]), at + 2 * count * length)
    return [
        TokenRecord(id=int(ids[i]), image=image[i], text=text[ends[i] : ends[i + 1]])
        for i in range(count)
    ]


def index_blocks(tar: bytes, members: list[Member], sizes: list[int]) -> dict[str, Any]:
    """Index a token shard: offset, length, records and crc32 of each block."""
    rows = [
        [m.start, m.length, size, zlib.crc32(tar[m.start : m.start + m.length])]
        for m, size in zip(members, sizes, strict=True)
    ]
    return {"samples": sum(sizes), "blocks": rows}


class TokenSource:
    """The token records of one split."""

    def __init__(self, store: Store, split: str) -> None:
        self._store, self._prefix = store, f"{split}/"
        self.manifest = read_manifest(store, self._prefix, TOKENS)
        self.fingerprint = self.manifest.fingerprint
        self._blocks = [
            (shard, row)
            for shard in self.manifest.shards
            for row in read_index(store, self._prefix, shard)["blocks"]
        ]
        self.sizes = [row[2] for _, row in self._blocks]

    def read(self, block: int) -> list[TokenRecord]:
        """Fetch one block.

        Raises: CorruptError, naming the shard, the offset and both digests.
        """
        shard, (start, length, _, crc) = self._blocks[block]
        data = self._store.get(self._prefix + shard.name, start, length)
        if zlib.crc32(data) != crc:
            raise CorruptError(
                f"{self._store.url}/{self._prefix}{shard.name}: the block at offset {start} has "
                f"crc32 {zlib.crc32(data):08x}, its index says {crc:08x}; restore the shard or "
                "run `tapir tokenize` with --again"
            )
        return decode_block(data)
