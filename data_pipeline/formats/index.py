"""The block index of a data set: flat arrays, small enough for every rank to hold them all.

A block is a run of records in a shard that one ranged GET reads. The arrays are stored as
safetensors: one file beside each shard, and one for the whole data set. A reader loads only the
latter at its start (20 bytes per block and variant).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from data_pipeline.streaming.cache import BlockCache

Ranges = Sequence[tuple[int, int, int]]
"""(start, bytes, records) of blocks."""
_FIELDS = {"start": np.uint64, "bytes": np.uint32, "records": np.uint32, "crc32": np.uint32}
_FETCHES = 3


@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """Per-block arrays of one shard, or of all shards of a variant in manifest order."""

    start: NDArray[np.uint64]
    bytes: NDArray[np.uint32]
    records: NDArray[np.uint32]
    crc32: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.start)


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
    return tensors.save({**vars(index), **rows})


def index_parts(index: BlockIndex) -> Iterator[bytes | memoryview]:
    """The index of a data set as safetensors, without a copy of its arrays."""
    order = sorted(_FIELDS, key=lambda name: (-np.dtype(_FIELDS[name]).itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        begin, end = end, end + getattr(index, name).nbytes
        kind = f"U{8 * np.dtype(_FIELDS[name]).itemsize}"
        header[name] = {"dtype": kind, "shape": [len(index)], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield memoryview(getattr(index, name).view(np.uint8))


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
    """The index of a data set, one for each variant.

    Raises: CorruptError, naming the file.
    """
    name = prefix + manifest.file(INDEX)
    arrays = _read(store, name, manifest.index_sha256)
    blocks = sum(shard.blocks for shard in manifest.shards)
    if {name: len(arrays.get(name, ())) for name in _FIELDS} != dict.fromkeys(_FIELDS, blocks):
        raise CorruptError(f"{store.url}/{name} does not hold the manifest's blocks")
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
        self._store, self._prefix, self._cache = store, prefix, cache
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
        index = self._variants[variant]
        name = self._prefix + self.shard_of(block, variant).name
        start, size = int(index.start[block]), int(index.bytes[block])
        expected = int(index.crc32[block])
        key = f"{self._store.url}/{name}:{start}:{size}:{expected:08x}"
        if self._cache:
            kept = self._cache.get(key)
            if kept is not None and crc32(kept) == expected:
                return kept
        data = b""
        for _ in range(_FETCHES):
            try:
                data = self._store.get(name, start, size)
            except AbsentError as error:
                raise CorruptError(
                    f"{self._store.url}/{name}: the block at offset {start} (crc32 {expected:08x}) "
                    f"cannot be read: {error}; restore the shard"
                ) from error
            if crc32(data) == expected:
                if self._cache:
                    self._cache.put(key, data)
                return data
        raise CorruptError(
            f"{self._store.url}/{name}: the block at offset {start} has crc32 "
            f"{crc32(data):08x} over {len(data)} bytes, its index says {expected:08x} over "
            f"{size}; restore the shard, or make it again by the command that made it, with --again"
        )

    def shard_of(self, block: int, variant: int = 0) -> Shard:
        """The shard that holds a block."""
        return self._shards[variant][int(np.searchsorted(self._ends, block, "right"))]

    def block_of_record(self, record: int) -> tuple[int, int]:
        """Convert a record's number in manifest order to (block, position in the block)."""
        ends = np.cumsum(self.records)
        block = int(np.searchsorted(ends, record, "right"))
        return block, record - int(ends[block] - self.records[block])

    def block_of(self, shard: int, record: int) -> tuple[int, int]:
        """Convert a record's position in a shard to (block, position in the block)."""
        first = int(self._ends[shard]) - self._shards[0][shard].blocks
        ends = np.cumsum(self.records[first : int(self._ends[shard])])
        block = int(np.searchsorted(ends, record, "right"))
        return first + block, record - int(ends[block - 1] if block else 0)
