"""The end of a raw data set: its block index with a mask, ids.bin and the manifest.

Shards were written by workers, each with an index of its own; or they belong to other sets (a
view). What is left out later is left out by the mask: a block is never cut again, and one without
records is not listed.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from core.errors import CorruptError, InputError
from core.storage.store import Store
from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.ids import IdSorter, rows_of_table
from data_pipeline.formats.index import BlockIndex, empty_index, index_parts, read_shard_index
from data_pipeline.formats.manifest import EARLIER, INDEX, RAW, Manifest, Shard, write_manifest
from data_pipeline.formats.split import OpenSplit, open_split
from data_pipeline.formats.views.masks import Kept, MaskWriter, Ranks, bits_of, counts, narrowed
from data_pipeline.formats.views.places import place_of

Keep = Callable[[int], Kept | None]
"""Which records of a unit or shard stay, by its number: one bit each, in order; None = all."""


def keep_all(_: int) -> None:
    """Leave nothing out."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A split of a finished set, whose shards a view lists."""

    store: Store
    split: str
    keep: Keep = keep_all
    """By the number of its shard."""


def write_split(
    store: Store,
    prefix: str,
    units: Sequence[Sequence[Shard]],
    facts: dict[str, Any],
    rejects: dict[str, int],
    keep: Keep = keep_all,
    earlier: OpenSplit | None = None,
) -> Manifest:
    """Write index.safetensors, ids.bin and the manifest of a raw split, as its last files.

    `units`: the shards of each unit, as their workers described them; `keep`: by the number of the
    unit, over the records of its shards, asked twice; `earlier`: the version of this split that the
    units follow: the next version is written. Memory: 24 bytes a block and a bit a pair.
    Raises: InputError if nothing is left, or an id occurs twice; CorruptError for a damaged index.
    """
    total, blocks = _total(units, keep), sum(shard.blocks for unit in units for shard in unit)
    if earlier:
        total += earlier.manifest.samples
        blocks += len(earlier.index[0])
    where = f"{store.url}/{prefix}".rstrip("/")
    with IdSorter(total, where) as ids:
        writer = _SplitWriter(blocks, ids)
        if earlier:
            writer.add_set(store, prefix, earlier, keep_all, lambda shard: shard)
            facts = {**facts, EARLIER: [*earlier.manifest.earlier, earlier.fingerprint]}
        writer.add_units(store, prefix, units, keep)
        return writer.finish(store, prefix, facts, rejects)


def write_view(
    store: Store,
    prefix: str,
    bases: Sequence[Base],
    facts: dict[str, Any],
    rejects: dict[str, int],
) -> Manifest:
    """Write a split over the shards of finished sets, which stay where they are.

    `facts` get the bases' fingerprints. Memory: 24 bytes a block and 4 a record of the largest
    base. Raises: InputError if nothing is left, an id occurs twice, or a base has no ids.bin.
    """
    opened = [open_split(base.store, base.split, RAW) for base in bases]
    total = sum(
        _total([[shard] for shard in split.manifest.shards], base.keep)
        for base, split in zip(bases, opened, strict=True)
    )
    with IdSorter(total, f"{store.url}/{prefix}".rstrip("/")) as ids:
        writer = _SplitWriter(sum(len(split.index[0]) for split in opened), ids)
        for number, (base, split) in enumerate(zip(bases, opened, strict=True)):
            before = f"{number:02d}-" if len(bases) > 1 else ""
            writer.add_set(
                *(base.store, f"{base.split}/", split, base.keep),
                partial(_elsewhere, base.store, f"{base.split}/", before),
            )
        views = {"bases": [split.fingerprint for split in opened]}
        return writer.finish(store, prefix, {**facts, **views}, rejects)


def _elsewhere(store: Store, prefix: str, before: str, shard: Shard) -> Shard:
    """A shard's entry in a view; `before` makes its name unique."""
    place = place_of(store, prefix, shard)
    return replace(shard, name=before + shard.name, place=place, index_sha256="")


def _total(units: Sequence[Sequence[Shard]], keep: Keep) -> int:
    """The number of records that stay."""
    total = 0
    for number, unit in enumerate(units):
        chosen, records = keep(number), sum(shard.samples for shard in unit)
        if chosen is not None and len(chosen) != records:
            raise ValueError(f"{len(chosen)} bits for the {records} records of unit {number}")
        total += records if chosen is None else int(np.count_nonzero(chosen))
    return total


class _SplitWriter:
    """Collects the shards of a split in order."""

    def __init__(self, blocks: int, ids: IdSorter) -> None:
        self._index, self._pairs = empty_index(blocks), np.zeros(blocks, np.uint32)
        self._mask, self._ids = MaskWriter(), ids
        self._shards: list[Shard] = []
        self._blocks = self._records = 0

    def add_units(
        self, store: Store, prefix: str, units: Sequence[Sequence[Shard]], keep: Keep
    ) -> None:
        """Add the shards of units, each with the index beside it."""
        shards = (shard for unit in units for shard in unit)
        indexes = fetched(lambda shard: read_shard_index(store, prefix, shard), shards)
        for number, unit in enumerate(units):
            chosen, at = keep(number), 0
            for shard in unit:
                arrays = next(indexes)
                ids, places = arrays.pop("ids"), arrays.pop("places").astype(np.int64)
                if (len(arrays["start"]), len(ids)) != (shard.blocks, shard.samples):
                    raise CorruptError(
                        f"{store.url}/{prefix}{shard.index_name} has other counts than its shard; "
                        "mend it by the command that made it, with --again"
                    )
                part = None if chosen is None else chosen[at : at + shard.samples]
                at += shard.samples
                if part is not None:
                    left = part[places]
                    ids, places = ids[left], (np.cumsum(part) - 1)[places[left]]
                self._ids.add(self._records, ids, places)
                self._add(shard, BlockIndex(**arrays), part)

    def add_set(
        self,
        store: Store,
        prefix: str,
        split: OpenSplit,
        keep: Keep,
        entry: Callable[[Shard], Shard],
    ) -> None:
        """Add the shards of a finished split; `entry` makes their entries."""
        manifest, index = split.manifest, split.index[0]
        chosen = _chosen(keep, manifest.shards)
        ranks = None if chosen is None else Ranks(chosen)
        table = prefix + manifest.file(IDS)
        for rows in rows_of_table(store, table, manifest.samples, manifest.lookup):
            ids, records = rows["id"], rows["record"].astype(np.int64)
            if ranks is not None:
                left = ranks.kept[records]
                ids, records = ids[left], ranks.of(records[left])
            self._ids.add(self._records, ids, records)
        first = record = 0
        for shard in manifest.shards:
            part = None if chosen is None else chosen[record : record + shard.samples]
            self._add(entry(shard), index.part(first, first + shard.blocks), part)
            first, record = first + shard.blocks, record + shard.samples

    def _add(self, shard: Shard, index: BlockIndex, chosen: Kept | None) -> None:
        """Add a shard's blocks that have a chosen record, and its entry if there is one."""
        pairs = index.records if index.pairs is None else index.pairs
        count = int(pairs.sum(dtype=np.int64))
        kept = np.ones(count, np.bool_)
        if index.mask is not None:
            kept = bits_of(index.mask, 0, count)
        kept = narrowed(kept, chosen)
        records = counts(kept, pairs)
        some = records > 0
        rows = slice(self._blocks, self._blocks + int(np.count_nonzero(some)))
        for name, array in index.arrays.items():
            if name in ("start", "bytes", "crc32"):
                getattr(self._index, name)[rows] = array[some]
        self._index.records[rows], self._pairs[rows] = records[some], pairs[some]
        self._mask.add(kept[np.repeat(some, pairs)])
        samples, whole = int(records.sum(dtype=np.int64)), shard.pairs or shard.samples
        if samples:
            blocks, pairs_of = rows.stop - rows.start, whole if whole != samples else 0
            self._shards.append(replace(shard, samples=samples, blocks=blocks, pairs=pairs_of))
        self._blocks, self._records = rows.stop, self._records + samples

    def finish(
        self, store: Store, prefix: str, facts: dict[str, Any], rejects: dict[str, int]
    ) -> Manifest:
        """Write the files of the split, the manifest last."""
        if not self._records:
            raise InputError(f"no pair is left for {store.url}/{prefix}; leave out fewer")
        arrays = {name: array[: self._blocks] for name, array in self._index.arrays.items()}
        if self._mask.dropped:
            arrays |= {"pairs": self._pairs[: self._blocks], "mask": self._mask.packed()}
        index, digest = BlockIndex(**arrays), hashlib.sha256()
        for part in index_parts(index):
            digest.update(part)
        manifest = Manifest(
            format=RAW,
            shards=self._shards,
            samples=self._records,
            facts=facts,
            rejects=rejects,
            index_sha256=digest.hexdigest(),
        )
        store.put_parts(prefix + manifest.file(INDEX), index_parts(index))
        table = self._ids.write(store, prefix + manifest.file(IDS))
        manifest = replace(manifest, lookup={"sha256": table, "bits": self._ids.bits})
        write_manifest(store, prefix, manifest)
        return manifest


def _chosen(keep: Keep, shards: Sequence[Shard]) -> Kept | None:
    """Which records of a set stay; None if all do."""
    chosen, first, is_all = np.ones(sum(shard.samples for shard in shards), np.bool_), 0, True
    for number, shard in enumerate(shards):
        part = keep(number)
        if part is not None:
            chosen[first : first + shard.samples], is_all = part, False
        first += shard.samples
    return None if is_all else chosen
