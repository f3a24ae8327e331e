"""The block index of a data set: flat arrays, small enough for every rank to hold them all.

A block is a run of records in a shard that one ranged GET reads. The arrays are stored as
safetensors: one file beside each shard, and one for the whole data set. A reader loads only the
latter at its start (20 bytes per block and variant; with a mask 4 bytes a block and a bit a pair
more). Only the latter tells which pairs are kept: a shard's index is as its worker wrote it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as tensors

from core.errors import AbsentError, CorruptError
from core.files.atomic import sha256
from core.storage.store import Store
from data_pipeline.formats.manifest import INDEX, Manifest, Shard
from data_pipeline.formats.views.masks import Kept, bits_of
from data_pipeline.formats.views.places import CHANGED, Places
from data_pipeline.streaming.cache import BlockCache

Ranges = Sequence[tuple[int, int, int]]
"""(start, bytes, records) of blocks."""
_FIELDS = {"start": np.uint64, "bytes": np.uint32, "records": np.uint32, "crc32": np.uint32}
_FETCHES = 3
AGAIN = "restore the shard, or make it again by the command that made it, with --again"


@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """Per-block arrays of one shard, or of all shards of a variant in manifest order."""

    start: NDArray[np.uint64]
    bytes: NDArray[np.uint32]
    records: NDArray[np.uint32]
    crc32: NDArray[np.uint32]
    pairs: NDArray[np.uint32] | None = None
    """Pairs that the bytes of each block hold, if some are left out; else all are records."""
    mask: NDArray[np.uint8] | None = None
    """A bit for each of these pairs (masks.py): 1 = it is a record."""

    def __len__(self) -> int:
        return len(self.start)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that are stored."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in arrays.items() if array is not None}

    @cached_property
    def _first_pair(self) -> NDArray[np.int64]:
        """For each block, the number of pairs before it."""
        pairs = self.records if self.pairs is None else self.pairs
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(pairs, dtype=np.int64)])

    def kept(self, block: int) -> Kept | None:
        """For each pair of a block, whether it is a record; None if all are."""
        if self.mask is None:
            return None
        first, end = self._first_pair[block : block + 2].tolist()
        return bits_of(self.mask, first, end - first)

    def part(self, first: int, end: int) -> "BlockIndex":
        """The index of some consecutive blocks, with a mask of their own."""
        arrays = {name: getattr(self, name)[first:end] for name in _FIELDS}
        if self.pairs is None or self.mask is None:
            return BlockIndex(**arrays)
        low, high = int(self._first_pair[first]), int(self._first_pair[end])
        mask = np.packbits(bits_of(self.mask, low, high - low), bitorder="little")
        return BlockIndex(**arrays, pairs=self.pairs[first:end], mask=mask)


def index_of(tar: bytes, ranges: Ranges) -> BlockIndex:
    """Build the index of a shard in memory."""
    view = memoryview(tar)
    rows = [(*row, crc32(view[row[0] : row[0] + row[1]])) for row in ranges]
    columns = np.asarray(rows, np.uint64).reshape(-1, len(_FIELDS)).T
    return BlockIndex(
        **{name: columns[i].astype(kind) for i, (name, kind) in enumerate(_FIELDS.items())}
    )


def dump_shard_index(index: BlockIndex, ids: NDArray[np.uint64]) -> bytes:
    """Serialise a shard's index with the sorted ids of its records and their positions."""
    order = np.argsort(ids, kind="stable")
    rows: dict[str, NDArray[Any]] = {"ids": ids[order], "places": order.astype(np.uint32)}
    return tensors.save({**index.arrays, **rows})


def index_parts(index: BlockIndex) -> Iterator[bytes | memoryview]:
    """The index of a data set as safetensors, without a copy of its arrays."""
    arrays = index.arrays
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        kind, shape = f"U{8 * arrays[name].itemsize}", [len(arrays[name])]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield arrays[name].view(np.uint8).data


def empty_index(blocks: int) -> BlockIndex:
    """Arrays for so many blocks, to be filled by `fill`."""
    return BlockIndex(**{name: np.zeros(blocks, kind) for name, kind in _FIELDS.items()})


def fill(index: BlockIndex, first: int, arrays: dict[str, NDArray[Any]]) -> int:
    """Copy a shard's arrays to the blocks from `first` on; returns the number of its blocks."""
    for name in _FIELDS:
        getattr(index, name)[first : first + len(arrays[name])] = arrays[name]
    return len(arrays["start"])


def joined(parts: Sequence[dict[str, NDArray[Any]]]) -> BlockIndex:
    """The indexes of some shards, one after another."""
    return BlockIndex(**{name: np.concatenate([part[name] for part in parts]) for name in _FIELDS})


def read_shard_index(store: Store, prefix: str, shard: Shard) -> dict[str, NDArray[Any]]:
    """A shard's index: start, bytes, records, crc32 of each block; ids and places of the records.

    Raises: CorruptError, naming the file.
    """
    return _read(store, prefix + shard.index_name, shard.index_sha256)


def read_index(store: Store, prefix: str, manifest: Manifest) -> list[BlockIndex]:
    """The index of a data set, one for each variant; raw sets have one, and a mask at most.

    Raises: CorruptError, naming the file.
    """
    name = prefix + manifest.file(INDEX)
    arrays = _read(store, name, manifest.index_sha256)
    blocks = sum(shard.blocks for shard in manifest.shards)
    if {name: len(arrays.get(name, ())) for name in _FIELDS} != dict.fromkeys(_FIELDS, blocks):
        raise CorruptError(f"{store.url}/{name} does not hold the manifest's blocks")
    if "mask" in arrays:
        return [BlockIndex(**arrays)]
    each = blocks // manifest.variants
    return [
        BlockIndex(**{name: arrays[name][v * each : (v + 1) * each] for name in _FIELDS})
        for v in range(manifest.variants)
    ]


def _read(store: Store, name: str, digest: str) -> dict[str, NDArray[Any]]:
    data = store.get(name)
    try:
        if sha256(data) == digest:
            return dict(tensors.load(data))
    except SafetensorError:
        pass
    raise CorruptError(
        f"{store.url}/{name} differs from its manifest: expected sha256 {digest}, got "
        f"{sha256(data)}; mend it by the command that made it, with --again"
    )


class BlockReader:
    """Reads the blocks of one split, each by a ranged GET with a checksum."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        manifest: Manifest,
        cache: BlockCache | None = None,
        index: Sequence[BlockIndex] = (),
    ) -> None:
        """`index` is that of the data set, if it has been read already."""
        self._places, self._cache = Places(store, prefix), cache
        self.manifest = manifest
        self._variants = list(index) or read_index(store, prefix, manifest)
        each = len(manifest.shards) // manifest.variants
        self._shards = [
            manifest.shards[v * each : (v + 1) * each] for v in range(manifest.variants)
        ]
        self._ends = np.cumsum([shard.blocks for shard in self._shards[0]])
        self.records = self._variants[0].records.astype(np.int64)

    def read(self, block: int, variant: int = 0) -> bytes:
        """Read one block, from the cache if it is there; fetch it again if its checksum is wrong.

        Raises: CorruptError, naming the shard, the offset and both digests.
        """
        index, shard = self._variants[variant], self.shard_of(block, variant)
        store, name = self._places.of(shard)
        start, size = int(index.start[block]), int(index.bytes[block])
        expected = int(index.crc32[block])
        key = f"{store.url}/{name}:{start}:{size}:{expected:08x}"
        if self._cache:
            kept = self._cache.get(key)
            if kept is not None and crc32(kept) == expected:
                return kept
        self._places.check(shard)
        data = b""
        for _ in range(_FETCHES):
            try:
                data = store.get(name, start, size)
            except AbsentError as error:
                raise CorruptError(
                    f"{store.url}/{name}: the block at offset {start} (crc32 {expected:08x}) "
                    f"cannot be read: {error}; restore the shard"
                ) from error
            if crc32(data) == expected:
                if self._cache:
                    self._cache.put(key, data)
                return data
        raise CorruptError(
            f"{store.url}/{name}: the block at offset {start} has crc32 {crc32(data):08x} over "
            f"{len(data)} bytes, its index says {expected:08x} over {size}; "
            f"{CHANGED if shard.place else AGAIN}"
        )

    @property
    def index(self) -> BlockIndex:
        """The index of the first variant; raw sets have one."""
        return self._variants[0]

    def kept(self, block: int) -> Kept | None:
        """For each pair that a block holds, whether it is a record; None if all are."""
        return self.index.kept(block)

    def shard_of(self, block: int, variant: int = 0) -> Shard:
        """The shard that holds a block."""
        return self._shards[variant][int(np.searchsorted(self._ends, block, "right"))]

    def blocks_of(self, shard: int) -> tuple[int, int]:
        """The blocks of a shard: (first, end)."""
        end = int(self._ends[shard])
        return end - self._shards[0][shard].blocks, end

    def block_of_record(self, record: int) -> tuple[int, int]:
        """Convert a record's number in manifest order to (block, position in the block)."""
        ends = np.cumsum(self.records)
        block = int(np.searchsorted(ends, record, "right"))
        return block, record - int(ends[block] - self.records[block])

    def block_of(self, shard: int, record: int) -> tuple[int, int]:
        """Convert a record's position in a shard to (block, position in the block)."""
        first, end = self.blocks_of(shard)
        ends = np.cumsum(self.records[first:end])
        block = int(np.searchsorted(ends, record, "right"))
        return first + block, record - int(ends[block - 1] if block else 0)
