"""The end of a pack job: duplicates of the whole set are masked, and the manifests are written.

It reads the units' records in the order of the plan, so that every finisher writes the same bytes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import AbsentError, CorruptError, InputError
from core.log import LOG
from core.storage.store import FolderStore, Store
from data_pipeline.catalogue.duplicates import duplicates
from data_pipeline.catalogue.parts import FACT, Part, put_catalogue
from data_pipeline.catalogue.schema import part_name
from data_pipeline.catalogue.verdict import Verdict, read_part
from data_pipeline.config import PackConfig
from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.ids import RepeatedIdError
from data_pipeline.formats.manifest import RAW, SPLITS, Shard
from data_pipeline.formats.raw_set import Keep, keep_all, write_split
from data_pipeline.formats.split import open_split
from data_pipeline.formats.views.masks import Kept
from data_pipeline.jobs.ledger import Record, finished_tasks
from data_pipeline.jobs.request import newest_version
from data_pipeline.packing.judge import refuse_rejects
from data_pipeline.packing.place import UNITS, delete_others, refuse_empty
from data_pipeline.packing.rejects import WHOLE_SET, Rejects
from data_pipeline.packing.unit import UnitTask


class SetWriter:
    """Writes the manifests of a set whose units are all done."""

    def __init__(
        self,
        store: Store,
        tasks: Sequence[UnitTask],
        request: dict[str, Any],
        config: PackConfig,
        version: int = 1,
        first: int = 0,
        ledgers: bool = True,
    ) -> None:
        """`tasks`: of all versions up to this one; `first`: number of its first unit.

        Without `ledgers` the markers alone are read (jobs/ledger.py).
        """
        self._store, self._tasks, self._request = store, tasks, request
        self._version, self._first = version, first
        self._config, self._ledgers = config, ledgers

    @cached_property
    def _is_newest(self) -> bool:
        """False if --again mends an earlier version."""
        return newest_version(self._store) <= self._version

    def write(self) -> bool:
        """Write both splits; False if a unit of this version is not done.

        Raises: InputError if there are no pairs, too many unusable ones, or a split is empty;
        CorruptError if a unit of an earlier version has no marker: no worker of this job makes it.
        """
        try:
            records = dict(finished_tasks(self._store, UNITS, self._ledgers))
        except AbsentError:
            return False
        missing = [task for task in self._tasks if task.name not in records]
        if any(task.number < self._first for task in missing):
            raise CorruptError(
                f"{self._store.url}/{missing[0].marker} is missing; run the `tapir pack` of that "
                "version with --again"
            )
        if missing:
            return False
        try:
            self._write([records[task.name] for task in self._tasks])
        except (KeyError, TypeError) as error:
            raise CorruptError(
                f"a record of {self._store.url}/{UNITS} is damaged ({error}); run `tapir pack` "
                "with --again"
            ) from error
        return True

    def _write(self, records: list[Record]) -> None:
        kinds = sum((Counter(record["rejects"]) for record in records), Counter[str]())
        self._refuse(records, kinds)
        units = {
            name: [[Shard(**row) for row in record["shards"][name]] for record in records]
            for name in SPLITS
        }
        shards = {name: [shard for unit in rows for shard in unit] for name, rows in units.items()}
        validation = self._config.validation
        refuse_empty(shards, f"pass another --validation (now {validation}) or give more pairs")
        if several := sum(record["several"] for record in records):
            LOG.info("%d pairs have several captions; one is drawn by key at each reading", several)
        filters = self._config.filters
        try:
            self._put(records, units, kinds, filters.duplicates or filters.near >= 0)
        except RepeatedIdError:
            self._put(records, units, kinds, True)  # the later one of two equal keys is left out
        rejects = {Rejects(self._store, 0.0, task.number).name for task in self._tasks}
        if self._is_newest:
            delete_others(self._store, shards, rejects | {WHOLE_SET})

    def _put(
        self,
        records: list[Record],
        units: dict[str, list[list[Shard]]],
        kinds: Counter[str],
        compare: bool,
    ) -> None:
        """Write the manifests, validation's last; `compare`: pairs with those of all units."""
        keeps: dict[str, Keep] = dict.fromkeys(SPLITS, keep_all)
        left_out: Iterator[pa.Table] = iter(())
        with ExitStack() as stack:
            if compare:
                verdict = self._verdict(stack)
                kinds = kinds + Counter(verdict.counts)
                self._refuse(records, kinds, verdict.counts.get("key", 0))
                keeps = {name: _keep(verdict, name) for name in SPLITS}
                if self._is_newest:
                    self._store.put_parts(WHOLE_SET, _reject_lines(verdict))
                left_out = verdict.left_out()
            parts = [Part(**record["catalogue"]) for record in records]
            catalogue = put_catalogue(self._store, parts, left_out)
            for name in SPLITS:
                facts = {"request": self._request, "split": name, FACT: catalogue}
                self._write_split(name, units[name], facts, dict(kinds), keeps[name])

    def _write_split(
        self,
        name: str,
        units: list[list[Shard]],
        facts: dict[str, Any],
        kinds: dict[str, int],
        keep: Keep,
    ) -> None:
        """Write a split; that of a later version begins with the blocks of the one before."""
        prefix = f"{name}/"
        if self._version == 1:
            write_split(self._store, prefix, units, facts, kinds, keep)
            return
        earlier = open_split(self._store, name, RAW, self._version - 1)
        first = self._first
        later = lambda number: keep(first + number)  # noqa: E731
        write_split(self._store, prefix, units[first:], facts, kinds, later, earlier)

    def _refuse(self, records: list[Record], kinds: Counter[str], repeated: int = 0) -> None:
        """`repeated`: pairs with a key of another unit."""
        packed = sum(record["packed"] for record in records) - repeated
        unusable = sum(record["unusable"] for record in records) + repeated
        if packed + unusable == 0:
            asked = f"; left out: {dict(kinds)}" if kinds else ""
            raise InputError(
                f"the source {self._request['source']!r} holds no pairs: no images with "
                f"captions{asked}"
            )
        first = next((record["first"] for record in records if record["first"]), "a repeated key")
        refuse_rejects(unusable, packed + unusable, self._config.max_rejects, first)

    def _verdict(self, stack: ExitStack) -> Verdict:
        """Which pairs the whole set leaves out."""
        names = [part_name(task.number) for task in self._tasks]
        parts = stack.enter_context(_local(self._store, names))
        return duplicates(parts, self._config.filters)


@contextmanager
def _local(store: Store, names: Sequence[str]) -> Iterator[list[Path]]:
    """Objects as local files; those of a store are fetched to TMPDIR."""
    if isinstance(store, FolderStore):
        yield [store.root / name for name in names]
        return
    with TemporaryDirectory(prefix="tapir-catalogue-") as folder:
        paths = [Path(folder, Path(name).name) for name in names]
        for path, data in zip(paths, fetched(store.get, names), strict=True):
            path.write_bytes(data)
        yield paths


def _keep(verdict: Verdict, split: str) -> Keep:
    """The masks of a split: one bit for each pair that its unit has kept."""

    def keep(number: int) -> Kept:
        rows = read_part(verdict.parts[number], ["split", "reject"])
        masks = verdict.masks(number)
        is_here = pc.equal(rows["split"], split).fill_null(False).to_numpy()
        kept = pc.is_null(rows["reject"]).to_numpy()[is_here]
        mask: Kept = masks.get(split, np.zeros(0, np.bool_))[kept]
        return mask

    return keep


def _reject_lines(verdict: Verdict) -> Iterator[bytes]:
    for table in verdict.left_out():
        for row in table.select(["key", "reject", "reason"]).to_pylist():
            line = {"key": row["key"], "kind": row["reject"], "reason": row["reason"]}
            yield (json.dumps(line) + "\n").encode()
