"""A tar of another program as shards of a data set, without a copy: its blocks are indexed.

The archive is read once, as a stream. A block is a run of bytes of at least `block` pairs that
yields them when it is parsed by itself (sources/tar_groups.py); other members between them are part
of it, unless they are long. Whole blocks are held out, so that training and validation read no byte
twice.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from core.files.atomic import sha256
from core.keys import key_fraction
from core.storage.store import Store
from data_pipeline.formats.index import BlockIndex, dump_shard_index
from data_pipeline.formats.manifest import SPLITS, Shard
from data_pipeline.formats.views.masks import Kept
from data_pipeline.sources.files import MOST_BYTES
from data_pipeline.sources.pair import Pair, Unusable, unusable
from data_pipeline.sources.tar_groups import Run
from data_pipeline.sources.tar_reader import Readable
from data_pipeline.sources.tars import archive_items

_HELD = 3 * MOST_BYTES
"""Bytes that are held at most: those of a pair with the other members between its own."""
_GAP = 2**20
"""Bytes between two pairs that end a block: they would be read in vain."""
_DRAIN = 2**20


def split_of_block(seed: int, archive: str, block: int, validation: float) -> str:
    """The split of a block of an archive that is read in place."""
    held_out = key_fraction(seed, archive, block, "split") < validation
    return SPLITS[1] if held_out else SPLITS[0]


class _Measured:
    """A stream with its size and digest; holds the bytes from the offset `first` on."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self._held = stream, bytearray()
        self.first = self.size = 0
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.size += len(data)
        self.digest.update(data)
        self._held += data
        self.drop(self.size - _HELD)
        return data

    def drop(self, end: int) -> None:
        """Drop what is held before an offset."""
        if end > self.first:
            del self._held[: end - self.first]
            self.first = end

    def crc32(self, start: int, end: int, before: int) -> int:
        """The checksum of held bytes, after others of the checksum `before`."""
        with (
            memoryview(self._held) as held,
            held[start - self.first : end - self.first] as part,
        ):
            return int(crc32(part, before))

    def drain(self) -> None:
        """Read the rest."""
        while self.read(_DRAIN):
            self.drop(self.size)


@dataclass(kw_only=True)
class _Block:
    """A run of pairs of the archive."""

    split: str
    start: int
    end: int
    pairs: int = 0
    crc32: int = 0


class InPlaceUnit:
    """One archive: iterate to its end, then `write` its shards."""

    def __init__(
        self,
        stream: Readable,
        place: str,
        archive: str,
        *,
        block: int,
        split_of: Callable[[int], str],
    ) -> None:
        """`place`: absolute path or URL; `archive`: what keys begin with; `split_of`: by block."""
        self._measured = _Measured(stream)
        self._place, self._archive, self._size = place, archive, block
        self._split_of = split_of
        self._blocks: list[_Block] = []
        self._is_open = False
        """True if the last block may grow."""

    def __iter__(self) -> Iterator[tuple[Pair | Unusable, str]]:
        """Yield each pair with its split, in order, and rejects (with "")."""
        pending: list[Pair] = []
        for item in archive_items(self._measured, self._place, self._archive, in_place=True):
            if isinstance(item, Pair):
                pending.append(item)
            elif isinstance(item, Unusable):
                yield item, ""
            else:
                for placed in self._placed(pending, item):
                    yield placed, self._blocks[-1].split if isinstance(placed, Pair) else ""
                pending = []
        self._measured.drain()

    def _placed(self, pairs: list[Pair], run: Run) -> list[Pair | Unusable]:
        """Add a run to the last block or to a new one; its pairs are rejects if it is too long."""
        measured, last = self._measured, self._blocks[-1] if self._is_open else None
        end = min(run.end, measured.size)  # a truncated archive may lack the padding
        is_lost = run.start < measured.first
        next_start = run.start if pairs else run.end
        if last and (is_lost or last.end < measured.first or next_start - last.end > _GAP):
            self._is_open, last = False, None
        if not pairs or is_lost:
            if last is None:
                measured.drop(end)
            reason = f"has other members between its own, {run.end - run.start} bytes in all"
            return [unusable(pair.where, reason) for pair in pairs]
        if last is None:
            split = self._split_of(len(self._blocks))
            last = _Block(split=split, start=run.start, end=run.start)
            self._blocks.append(last)
        last.crc32 = measured.crc32(last.end, end, last.crc32)
        last.end, last.pairs = end, last.pairs + len(pairs)
        measured.drop(end)
        self._is_open = last.pairs < self._size and last.end - last.start < MOST_BYTES
        return list(pairs)

    def write(
        self,
        store: Store,
        number: int,
        *,
        etag: str,
        ids: NDArray[np.uint64],
        kept: Kept,
        captions: str = "",
    ) -> dict[str, Shard]:
        """Write an index for each split that has records; returns the shards by split.

        It lists all blocks of the split, also those without a kept pair.
        `ids`, `kept`: of all pairs, in order; `captions`: the caption filters (Shard.captions).
        """
        ends = np.cumsum([0, *(block.pairs for block in self._blocks)])
        entry = Shard(
            name=f"shard-{number:06d}.tar",
            samples=0,
            blocks=0,
            bytes=self._measured.size,
            sha256=self._measured.digest.hexdigest(),
            etag=etag,
            index_sha256="",
            place=self._place,
            archive=self._archive,
            captions=captions,
        )
        shards = {}
        for split in SPLITS:
            rows = [
                (block, slice(ends[i], ends[i + 1]))
                for i, block in enumerate(self._blocks)
                if block.split == split
            ]
            if not any(kept[pairs].any() for _, pairs in rows):
                continue
            index = _index_of([block for block, _ in rows], [kept[pairs] for _, pairs in rows])
            chosen = np.concatenate([ids[pairs][kept[pairs]] for _, pairs in rows])
            total = sum(block.pairs for block, _ in rows)
            data = dump_shard_index(index, chosen)
            store.put(f"{split}/{entry.index_name}", data)
            shards[split] = replace(
                entry,
                samples=len(chosen),
                blocks=len(index),
                index_sha256=sha256(data),
                pairs=total if total != len(chosen) else 0,
            )
        return shards


def _index_of(blocks: list[_Block], masks: list[Kept]) -> BlockIndex:
    """The index of some blocks of an archive, with a mask if not all of their pairs are kept."""
    mask = np.concatenate(masks)
    return BlockIndex(
        start=np.asarray([block.start for block in blocks], np.uint64),
        bytes=np.asarray([block.end - block.start for block in blocks], np.uint32),
        records=np.asarray([np.count_nonzero(m) for m in masks], np.uint32),
        crc32=np.asarray([block.crc32 for block in blocks], np.uint32),
        pairs=None if mask.all() else np.asarray([block.pairs for block in blocks], np.uint32),
        mask=None if mask.all() else np.packbits(mask, bitorder="little"),
    )
