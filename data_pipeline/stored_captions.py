"""The captions of a raw split, a shard at a time, without its pictures where a catalogue has them.

A row of the catalogue belongs to a record if it has its id. The ids of a shard are in the index
beside it, in the order of the records that its worker wrote; the mask of the set's index says which
of them are left.
"""

import io
import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.errors import AbsentError, CorruptError
from core.files.atomic import sha256
from core.storage.store import Store
from data_pipeline.catalogue.parts import FACT, Part, read_list
from data_pipeline.catalogue.schema import part_name
from data_pipeline.formats.index import BlockIndex, read_shard_index
from data_pipeline.formats.manifest import Shard
from data_pipeline.formats.raw_shards import RawShards

_UNIT = re.compile(r"shard-(\d{6,})(?:-\d{3,})?\.tar")


class StoredCaptions:
    """The captions of one split."""

    def __init__(self, store: Store, split: str) -> None:
        """Raises: InputError if there is no raw data set."""
        self._store, self._split = store, split
        self.shards = RawShards(store, split)

    def of(self, number: int) -> Iterator[str]:
        """All captions of a shard's records, in their order.

        Raises: CorruptError, naming the shard or the catalogue's part.
        """
        shard = self.shards.manifest.shards[number]
        part = self._part_of(shard)
        if part is None:
            for record in self.shards.records(number):
                yield from record.captions
            return
        texts = self._texts(part)
        for id_ in self._ids(number).tolist():
            if id_ not in texts:
                raise CorruptError(
                    f"{self._store.url}/{part.name} has no row of a pair of {shard.shown}; mend it "
                    "by the `tapir pack` that made it, with --again"
                )
            yield from texts[id_]

    @cached_property
    def _parts(self) -> dict[str, Part]:
        """The files of the catalogue by name; empty if the set has none."""
        digest = self.shards.manifest.facts.get(FACT)
        if not isinstance(digest, str):
            return {}
        rows = (Part(**row) for row in read_list(self._store, digest)["parts"])
        return {part.name: part for part in rows if not part.place}

    def _part_of(self, shard: Shard) -> Part | None:
        """The rows of the shard's unit; None if the set has none, or the shard has no index."""
        match = _UNIT.fullmatch(shard.name)
        if match is None or not shard.index_sha256:
            return None
        return self._parts.get(part_name(int(match[1])))

    def _texts(self, part: Part) -> dict[int, list[str]]:
        """The captions of the unit's pairs in this split, by id."""
        try:
            data = self._store.get(part.name)
        except AbsentError:
            data = b""
        if sha256(data) != part.sha256:
            raise CorruptError(
                f"{self._store.url}/{part.name} is missing or differs from its digest; mend it by "
                "the `tapir pack` that made it, with --again"
            )
        rows = pq.read_table(io.BytesIO(data), columns=["id", "captions", "split"])
        rows = rows.filter(pc.equal(rows["split"], self._split))
        return dict(zip(rows["id"].to_pylist(), rows["captions"].to_pylist(), strict=True))

    def _ids(self, number: int) -> NDArray[np.uint64]:
        """The ids of a shard's records, in their order."""
        shard = self.shards.manifest.shards[number]
        arrays = read_shard_index(self._store, f"{self._split}/", shard)
        ids, places = arrays.pop("ids"), arrays.pop("places")
        in_order = np.empty_like(ids)
        in_order[places] = ids
        if not shard.pairs:
            return in_order
        own, ends = BlockIndex(**arrays), np.cumsum(arrays["records"], dtype=np.int64)
        blocks, chosen = self.shards.blocks, []
        for block in range(*blocks.blocks_of(number)):
            i = int(np.searchsorted(own.start, blocks.index.start[block]))
            here = in_order[ends[i] - int(own.records[i]) : ends[i]]
            left, written = blocks.kept(block), own.kept(i)
            if left is not None:
                here = here[left if written is None else left[written]]
            chosen.append(here)
        return np.concatenate(chosen)
