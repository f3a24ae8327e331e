"""Raw shards as blocks of pairs: one ranged GET a block, a crc32 for every pair."""

import zlib
from dataclasses import dataclass

from core.errors import CorruptError
from core.store import Store
from data_pipeline.manifest import RAW, Shard, read_manifest
from data_pipeline.shards import read_index


@dataclass(frozen=True, kw_only=True)
class RawRecord:
    """A stored pair, still encoded."""

    key: str
    image: bytes
    caption: str


class RawSource:
    """The pairs of one split."""

    def __init__(self, store: Store, split: str, block: int) -> None:
        self._store, self._prefix = store, f"{split}/"
        self.manifest = read_manifest(store, self._prefix, RAW)
        self.fingerprint = self.manifest.fingerprint
        self._blocks: list[tuple[Shard, list[list[int]]]] = []
        for shard in self.manifest.shards:
            pairs = read_index(store, self._prefix, shard)["pairs"]
            self._blocks += [(shard, pairs[i : i + block]) for i in range(0, len(pairs), block)]
        self.sizes = [len(pairs) for _, pairs in self._blocks]

    def shard_of(self, block: int) -> Shard:
        """The shard that a block lies in."""
        return self._blocks[block][0]

    def read(self, block: int) -> list[RawRecord]:
        """Fetch one block.

        Raises: CorruptError, naming the shard and the pair.
        """
        shard, pairs = self._blocks[block]
        start = min(min(pair[1], pair[3]) for pair in pairs)
        end = max(max(pair[1] + pair[2], pair[3] + pair[4]) for pair in pairs)
        data = self._store.get(self._prefix + shard.name, start, end - start)
        records = []
        for key, image_at, image_size, text_at, text_size, crc in pairs:
            image = data[image_at - start :][:image_size]
            text = data[text_at - start :][:text_size]
            if zlib.crc32(image + text) != crc:
                raise CorruptError(
                    f"{self._store.url}/{self._prefix}{shard.name}: the pair {key!r} at offset "
                    f"{image_at} has crc32 {zlib.crc32(image + text):08x}, its index says "
                    f"{crc:08x}; restore the shard or run its `tapir pack` with --again"
                )
            records.append(RawRecord(key=str(key), image=image, caption=text.decode()))
        return records
