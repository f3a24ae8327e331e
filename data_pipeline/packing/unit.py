"""One unit of a pack job: its source is read once, as a stream, and written as shards.

    <split>/shard-<unit>.tar             KEY.jpg|png|webp, KEY.json, KEY.txt; then -001, -002, ...
    <split>/shard-<unit>*.index.safetensors
    rejects/<unit>.jsonl                 rejected pairs: key, kind, reason
    catalogue/<unit>.parquet             a row for each pair and reject

In place, a plain tar has no shards: its indexes name the ranges of its blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import numpy as np

from core.errors import InputError
from core.keys import key_int
from core.log import LOG
from core.storage.entry import Entry
from core.storage.store import Store
from data_pipeline.catalogue.parts import part_of
from data_pipeline.catalogue.schema import CatalogueWriter, part_name
from data_pipeline.config import PackConfig
from data_pipeline.formats.in_place import InPlaceUnit, split_of_block
from data_pipeline.formats.manifest import SPLITS, Shard, shard_json
from data_pipeline.formats.raw import caption_rules
from data_pipeline.jobs.ledger import Record
from data_pipeline.jobs.worker import Progress, Task
from data_pipeline.packing.examine import Examined, Placed, examined
from data_pipeline.packing.plan_file import read_rows
from data_pipeline.packing.rejects import Rejects
from data_pipeline.packing.writer import RawWriter
from data_pipeline.sources.pair import Unusable
from data_pipeline.sources.plan import Source
from data_pipeline.sources.tars import HEAD, is_compressed
from data_pipeline.sources.units import Unit, unit_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTask(Task):
    """A unit; its name is the digest of the unit and of the job's request."""

    number: int
    units: tuple[Unit, ...]
    """One; with --count all units of the job, read one after another."""
    bytes: int = 0
    """To read, to judge progress."""


class UnitPacker:
    """Makes the units of a job."""

    def __init__(self, store: Store, sources: Sequence[Source], config: PackConfig) -> None:
        self._store, self._sources, self._config = store, sources, config

    def make(self, task: UnitTask, progress: Progress) -> Record:
        """Read a unit and write its outputs; returns its record.

        Raises: InputError for an unusable pair if max_rejects is 0, or for a changed source.
        """
        output = _Output(self._store, task.number, self._config)
        with ExitStack() as stack:
            tar = self._plain_tar(task.units[0], stack) if self._config.in_place else None
            items = iter(tar.unit) if tar else self._copied(task.units)
            for item in examined(items, self._config):
                output.add(item, is_placed=tar is not None)
                progress["pairs"] = output.packed
                if 0 < self._config.count == output.packed:
                    break
        return {**output.close(tar), "bytes": task.bytes, "in_place": tar is not None}

    def _copied(self, units: Sequence[Unit]) -> Iterator[Placed]:
        for unit in units:
            source = self._sources[unit.source]
            refuse_changed(source, unit)
            rows = read_rows(self._store, unit.name) if unit.kind == "files" else []
            for item in unit_pairs(unit, source.files, rows, self._config):
                yield item, ""

    def _plain_tar(self, unit: Unit, stack: ExitStack) -> "_Tar | None":
        """The archive, to be read in place; None for what must be copied."""
        source, config = self._sources[unit.source], self._config
        if unit.kind != "tar" or source.files is None:
            return None
        entry = refuse_changed(source, unit)
        try:
            file = stack.enter_context(source.files.open(unit.name))
        except OSError:
            return None  # the copy says why
        if is_compressed(file.read(HEAD)):
            LOG.info("%s is compressed, and is copied", source.files.where(unit.name))
            return None
        file.seek(0)
        place = InPlaceUnit(
            file,
            source.files.place(unit.name),
            unit.archive,
            block=config.block,
            split_of=lambda n: split_of_block(config.seed, unit.archive, n, config.validation),
        )
        return _Tar(unit=place, etag=entry.tag)


@dataclass(frozen=True, kw_only=True)
class _Tar:
    """An archive that is read in place."""

    unit: InPlaceUnit
    etag: str


def refuse_changed(source: Source, unit: Unit) -> Entry:
    """The archive or table of a unit as it is now.

    Raises: InputError if it has changed since it was listed; both would be mixed.
    """
    if source.files is None or unit.kind not in ("tar", "table"):
        return Entry(unit.name, unit.size, unit.tag)
    entry = source.files.entry(unit.name)
    if entry is not None and entry.tag and unit.tag and entry.tag != unit.tag:
        raise InputError(
            f"{source.files.where(unit.name)} has changed since this job listed its sources; pack "
            "into an empty DEST when nothing writes to them"
        )
    return entry or Entry(unit.name, unit.size, unit.tag)


class _Output:
    """What one unit writes."""

    def __init__(self, store: Store, number: int, config: PackConfig) -> None:
        self._store, self._number, self._config = store, number, config
        self._writers = {name: RawWriter(store, name, config, number) for name in SPLITS}
        self._rejects = Rejects(store, config.max_rejects, number)
        self._catalogue = CatalogueWriter(number)
        self._keys: set[int] = set()
        self._ids: list[int] = []
        self._kept: list[bool] = []
        self.packed = self._several = 0

    def add(self, item: Examined, is_placed: bool) -> None:
        """Add an item; `is_placed`: its pair is read in place, and nothing is copied.

        Raises: InputError if it is unusable and max_rejects is 0.
        """
        pair, reject, asked, row = item.pair, item.reject, item.asked, item.row
        if pair is not None and reject is None:
            if (number := key_int(pair.key)) in self._keys:
                reason = f"the key {pair.key!r} ({pair.where}) occurs twice; give it another name"
                reject = Unusable(key=pair.key, kind="key", reason=reason)
                row = replace(row, reject=reject.kind, reason=reject.reason)
            self._keys.add(number)
        if reject is not None:
            self._rejects.add(reject, asked)
            row = row if is_placed else replace(row, split=None)
        if pair is not None:
            if is_placed:
                self._ids.append(key_int(pair.key))
                self._kept.append(reject is None)
            if reject is None:
                self._pack(item, row.split or "", is_placed)
        self._catalogue.add(row)

    def _pack(self, item: Examined, split: str, is_placed: bool) -> None:
        self.packed += 1
        self._several += len(item.captions) > 1
        if item.pair is not None and not is_placed:
            self._writers[split].add(item.pair, *item.captions)

    def close(self, tar: _Tar | None) -> Record:
        """Write what is left; returns the record of the unit."""
        shards: dict[str, list[Shard]] = {}
        for name, writer in self._writers.items():
            writer.flush()
            shards[name] = writer.shards
        if tar is not None:
            placed = tar.unit.write(
                self._store,
                self._number,
                etag=tar.etag,
                ids=np.asarray(self._ids, np.uint64),
                kept=np.asarray(self._kept, np.bool_),
                captions=caption_rules(self._config.filters),
            )
            shards = {name: [placed[name]] if name in placed else [] for name in SPLITS}
        self._rejects.flush()
        part = self._catalogue.finish()
        self._store.put(part_name(self._number), part)
        rejects = self._rejects
        return {
            "shards": {name: [shard_json(s) for s in rows] for name, rows in shards.items()},
            "catalogue": asdict(part_of(self._number, self._catalogue.rows, part)),
            "pairs": self.packed + rejects.unusable,
            "packed": self.packed,
            "several": self._several,
            "rejects": dict(rejects.kinds),
            "unusable": rejects.unusable,
            "first": rejects.first,
        }
