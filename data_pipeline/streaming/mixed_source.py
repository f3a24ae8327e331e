"""The data sets of a mixture as one source: the blocks of the first, then those of the next."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from core.storage.mixture import data_sets, names_of
from core.storage.store import open_store
from data_pipeline.formats.split import OpenSplit, SplitSource
from data_pipeline.streaming.cache import BlockCache
from data_pipeline.streaming.state import mixed_fingerprint
from data_pipeline.streaming.stream import stored_records


@dataclass(frozen=True, kw_only=True)
class Part:
    """One data set of a source."""

    name: str
    """Short name, for figures; empty if it is the only one."""
    place: str
    share: Fraction
    source: Any
    """A block source."""


class MixedSource:
    """Several block sources; a stream reads each by its share, other readers all blocks."""

    variants = 1
    """Of the mixture; each part has its own."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.sources = [part.source for part in parts]
        self.fingerprints = [source.fingerprint for source in self.sources]
        self.fingerprint = mixed_fingerprint(self.fingerprints)
        self.sizes: NDArray[Any] = np.concatenate([source.sizes for source in self.sources])
        self._ends = np.cumsum([len(source.sizes) for source in self.sources])

    def read(self, block: int, variant: int = 0) -> Any:
        """Fetch a block of one of the parts."""
        number = int(np.searchsorted(self._ends, block, "right"))
        source = self.sources[number]
        return source.read(block - int(self._ends[number]) + len(source.sizes), variant)

    def buffer(self, sizes: NDArray[Any], free: Any = None) -> Any:
        """A buffer for blocks of these sizes."""
        return self.sources[0].buffer(sizes, free)

    def empty(self) -> Any:
        """No records."""
        return self.sources[0].empty()

    @property
    def kind(self) -> str:
        """Format of the sets."""
        return str(self.sources[0].kind)

    @property
    def has_index(self) -> bool:
        """False on ranks that read no records."""
        return bool(self.sources[0].has_index)

    @property
    def manifest(self) -> Any:
        """That of the first part: sets of a mixture agree in what their records are."""
        return self.sources[0].manifest

    def member(self, key: str, name: str) -> str:
        """Where a pair's member is stored, for messages."""
        for source in self.sources:
            with suppress(InputError):
                return str(source.member(key, name))
        return name


def parts_of(source: Any) -> tuple[Part, ...]:
    """The data sets of a source; one that is no mixture is its own only part."""
    if isinstance(source, MixedSource):
        return source.parts
    return (Part(name="", place="", share=Fraction(1), source=source),)


def at_versions(source: Any, opened: Sequence[OpenSplit]) -> Any:
    """The same data sets in other versions; `opened`: the split of each."""
    if not isinstance(source, MixedSource):
        return source.at(opened[0])
    parts = zip(source.parts, opened, strict=True)
    return MixedSource([replace(part, source=part.source.at(split)) for part, split in parts])


def open_source(
    kind: type[SplitSource],
    data: str,
    split: str,
    opened: Sequence[OpenSplit] = (),
    cache: BlockCache | None = None,
) -> Any:
    """The source of a setting's data set or mixture; `opened`: the split of each set, if known."""
    sets = data_sets(data)
    splits: Sequence[OpenSplit | None] = opened or [None] * len(sets)
    sources = [
        kind(open_store(each.place), split, cache, known)
        for each, known in zip(sets, splits, strict=True)
    ]
    if len(sets) == 1:
        return sources[0]
    names = names_of([each.place for each in sets])
    rows = zip(names, sets, sources, strict=True)
    return MixedSource(
        [Part(name=n, place=s.place, share=s.share, source=source) for n, s, source in rows]
    )


def first_of_each(source: Any, count: int) -> list[Any]:
    """About `count` records in stored order, of each data set by its share."""
    records: list[Any] = []
    for part in parts_of(source):
        records += islice(stored_records(part.source), -int(-count * part.share // 1))
    return records


def held_out_counts(source: Any, asked: int, lanes: int) -> list[int]:
    """Records of each data set that a validation reads, of `asked` in all.

    Each set gives its share, rounded down to a multiple of `lanes` so that the replicas of every
    mesh share it equally, and `lanes` at least.
    """
    counts = []
    for part in parts_of(source):
        held = int(sum(part.source.sizes))
        count = min(max(int(asked * part.share), min(asked, lanes)), held)
        counts.append(count - count % lanes)
    return counts
