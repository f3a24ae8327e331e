"""The shards of a raw split, each read as a whole: what jobs of workers take as their tasks."""

from collections.abc import Iterable, Iterator
from functools import cached_property, partial

from core.errors import CorruptError
from core.files.atomic import canonical_json, sha256
from core.storage.store import Store
from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.index import BlockReader
from data_pipeline.formats.manifest import RAW, Manifest, read_manifest
from data_pipeline.formats.raw import RawRecord, parse_pairs, read_records

_THREADS = 2


class RawShards:
    """One split; its block index is read only if a shard is masked or at another place."""

    def __init__(self, store: Store, split: str, manifest: Manifest | None = None) -> None:
        """`manifest`: that of a version before the newest.

        Raises: InputError if there is no raw data set.
        """
        self._store, self._prefix = store, f"{split}/"
        self.manifest = manifest or read_manifest(store, self._prefix, RAW)

    @cached_property
    def blocks(self) -> BlockReader:
        return BlockReader(self._store, self._prefix, self.manifest)

    def digest(self, number: int) -> str:
        """What identifies the records of a shard."""
        shard = self.manifest.shards[number]
        if shard.is_whole:
            return shard.sha256
        index = self.blocks.index.part(*self.blocks.blocks_of(number))
        arrays = {name: sha256(array.tobytes()) for name, array in index.arrays.items()}
        return sha256(canonical_json({"content": shard.content, **arrays}))

    def records(self, number: int) -> Iterable[RawRecord]:
        """The records of a shard, in order; of one that is not whole, a few blocks are in memory.

        Raises: CorruptError, naming it, if its bytes differ from the manifest's.
        """
        shard = self.manifest.shards[number]
        if not shard.is_whole:
            return self._records_of_blocks(number)
        name = self._prefix + shard.name
        data = self._store.get(name)
        if sha256(data) != shard.sha256:
            raise CorruptError(
                f"{self._store.url}/{name} differs from its manifest (sha256 {sha256(data)}, "
                f"expected {shard.sha256}); restore it or run its `tapir pack` with --again"
            )
        return parse_pairs(data)

    def _records_of_blocks(self, number: int) -> Iterator[RawRecord]:
        read = partial(read_records, self.blocks)
        for records in fetched(read, range(*self.blocks.blocks_of(number)), _THREADS):
            yield from records
