"""One unit of a pack job: its source is read once, as a stream, and written as shards.

    <split>/shard-<unit>.tar             KEY.jpg|png|webp, KEY.json, KEY.txt; then -001, -002, ...
    <split>/shard-<unit>*.index.safetensors
    rejects/<unit>.jsonl                 rejected pairs: key, kind, reason
    catalogue/<unit>.parquet             a row for each pair and reject

In place, a plain tar has no shards: its indexes name the ranges of its blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.errors import InputError
from core.keys import key_int
from core.storage.store import Store
from data_pipeline.catalogue.schema import CatalogueWriter, part_name
from data_pipeline.config import PackConfig
from data_pipeline.formats.in_place import InPlaceUnit, split_of_block
from data_pipeline.formats.manifest import SPLITS, Shard, shard_json
from data_pipeline.jobs.ledger import Record
from data_pipeline.jobs.worker import Progress, Task
from data_pipeline.packing.examine import Examined, Placed, examined
from data_pipeline.packing.plan_file import read_rows
from data_pipeline.packing.rejects import Rejects
from data_pipeline.packing.writer import RawWriter, of_unit
from data_pipeline.sources.pair import Unusable
from data_pipeline.sources.plan import Source
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

        Raises: InputError for an unusable pair if max_rejects is 0, or a changed source.
        """
        in_place = self._in_place(task)
        output = _Output(self._store, task.number, self._config)
        items = in_place or self._items(task)
        for item in examined(items, self._config):
            output.add(item, copies=in_place is None)
            progress["pairs"] = output.packed
            if output.packed == self._config.count:
                break
        if in_place is not None:
            return output.close(in_place)
        return output.close()
