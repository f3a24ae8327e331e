"""`tapir pack SRC ... DEST`: raw pairs -> WebDataset shards, by any number of workers.

<split>/shard-000000.tar     KEY.jpg|png|webp, KEY.json, KEY.txt: any WebDataset reader reads it
<split>/*.index.safetensors  block index of a shard, and of the data set
<split>/ids.bin              the record of each id (formats/ids.py)
<split>/manifest.json        written last
rejects/*.jsonl              rejected pairs: key, kind, reason
catalogue/*.parquet          a row for each pair and reject
units/                       the plan, and what is done (jobs/worker.py)
*-000002.*                   of the next version (versions.py)

The sources are listed once and cut into units (sources/plan.py). A unit is a task of the job: it
yields the same bytes whoever makes it (unit.py). The last worker writes the manifests (finish.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import S3, check, to_json
from core.errors import CorruptError, InputError
from core.files.atomic import sha256
from core.log import LOG, progress
from core.storage.store import Store
from core.workers import JobWorker
from data_pipeline.catalogue.schema import part_name
from data_pipeline.config import PackConfig
from data_pipeline.formats.index import read_shard_index
from data_pipeline.formats.manifest import Manifest, Shard
from data_pipeline.jobs.ledger import Record
from data_pipeline.jobs.worker import Job, Progress, Work
from data_pipeline.packing.finish import SetWriter
from data_pipeline.packing.judge import Judge
from data_pipeline.packing.place import UNITS, claim, refuse_pattern, refuse_refused, taken
from data_pipeline.packing.plan_file import shared_plan
from data_pipeline.packing.unit import UnitPacker, UnitTask
from data_pipeline.packing.versions import (
    claim_next,
    finished_version,
    outputs_of,
    place_given_back,
    result_of,
    tasks_of,
)
from data_pipeline.sources.pair import printable
from data_pipeline.sources.plan import Source, open_sources

_NOT_ASKED = ("cache", "threads", "lease_seconds")
"""Settings that do not affect the output."""
_WRITTEN = (
    *("request.json", "train/shard-000000.tar", "train/shard-000000.index.safetensors"),
    *("train/manifest.json", "units/plan.json", "catalogue/000000.parquet"),
)
"""Names of what is packed, of each kind."""
ALONE = JobWorker(number=0, count=1)


def pack(
    sources: str | Sequence[str],
    store: Store,
    config: PackConfig,
    again: bool = False,
    member: JobWorker = ALONE,
    append: bool = False,
) -> dict[str, Manifest]:
    """Write the pairs of one or several SRC to the store, as one worker of the job.

    Finished work with the same settings is kept. `again` verifies this worker's units and writes
    damaged ones again: equal SRC, equal bytes. `append` writes the next version of the set.
    Raises: InputError for unusable pairs beyond max_rejects, or if DEST holds other data.
    """
    check(config.problems())
    refuse_pattern(store)
    texts = [sources] if isinstance(sources, str) else list(sources)
    opened = open_sources(texts)
    for source in opened:
        _refuse_inside(source, store)
    request = _request(opened, config)
    version = 1
    if append:
        _refuse_generated(opened)
        version = claim_next(store, request, again)
    else:
        claim(store, request, again)
    manifests = finished_version(store, version)
    if manifests and manifests["train"].facts.get("request") != request:
        raise taken(store, manifests["train"].facts.get("request", {}))
    if manifests and not again:
        LOG.info("%s already holds this data set", store.url)
        return manifests
    with place_given_back(store, version, alone=member.count == 1):
        _Pack(store, opened, request, config, member, version).run(again)
    return finished_version(store, version)


def _refuse_generated(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.files is None:
            raise InputError(
                f"--append adds archives, tables and folders, and {source.text} is drawn; pack it "
                "anew with a larger --count"
            )


def _request(sources: Sequence[Source], config: PackConfig) -> dict[str, Any]:
    """What the data set is made of."""
    settings = {k: v for k, v in to_json(config).items() if k not in _NOT_ASKED}
    if not config.in_place:
        del settings["in_place"]  # older sets have no such setting
    contents = [source.content for source in sources]
    return {
        "source": ", ".join(printable(source.text) for source in sources),
        "content": contents[0] if len(contents) == 1 else sha256("\n".join(contents).encode()),
        "config": settings,
    }


def _refuse_inside(source: Source, store: Store) -> None:
    """Refuse a DEST in which a source would list what is packed."""
    if source.files is None or source.single is not None:
        return
    root, dest = (_absolute(url) for url in (source.files.url, store.url))
    if not f"{dest}/".startswith(f"{root}/"):
        return
    below = dest.removeprefix(root).strip("/")
    names = (f"{below}/{name}".strip("/") for name in _WRITTEN)
    if any(map(source.select.selects, names)):
        raise InputError(
            f"DEST {store.url} is inside SRC {source.text}; give a place outside of it"
        )


def _absolute(url: str) -> str:
    return url.rstrip("/") if url.startswith(S3) else Path(url).resolve().as_posix().rstrip("/")


class _Pack:
    """The job, as one worker sees it."""

    def __init__(
        self,
        store: Store,
        sources: Sequence[Source],
        request: dict[str, Any],
        config: PackConfig,
        member: JobWorker,
        version: int,
    ) -> None:
        self._store, self._request, self._config = store, request, config
        self._alone, self._version = member.count == 1, version
        shared_plan(store, sources, config, version)
        self._tasks = tasks_of(store, version)
        self._packer = UnitPacker(store, sources, config)
        self._job = Job(store, self._tasks, member, config.lease_seconds)
        self._packed = 0

    def run(self, again: bool) -> None:
        """Make units and the set; `again` repairs damaged units."""
        earlier = [t for v in range(1, self._version) for t in tasks_of(self._store, v)]
        writer = SetWriter(
            *(self._store, [*earlier, *self._tasks], self._request, self._config),
            *(self._version, len(earlier), not again),
        )
        result = result_of(self._store, self._version)
        ends = [self._job.finisher(UNITS, result, writer.write)]
        self._job.announce("pack", ends, len(earlier))
        if again:
            outputs = lambda task: outputs_of(self._store, task.number)  # noqa: E731
            self._job.repair(self._check, outputs, ends)
        judge = Judge(self._store, self._tasks, self._config.max_rejects, self._alone)
        total = sum(task.size for task in self._job.own if all(t.size for t in self._tasks))
        with progress("pack", total) as self._meter:
            self._job.run(Work(make=self._make, judge=judge.judge), ends, again)

    def _make(self, task: UnitTask, moved: Progress) -> Record:
        if not self._alone:
            refuse_refused(self._store)
        record = self._packer.make(task, moved)
        self._packed += record["packed"]
        self._meter.update(self._packed)
        return record

    def _check(self, task: UnitTask, record: Record) -> None:
        """Raise CorruptError or AbsentError if an output differs from the unit's record."""
        expected = {part_name(task.number): record["catalogue"]["sha256"]}
        for split, rows in record["shards"].items():
            for shard in (Shard(**row) for row in rows):
                read_shard_index(self._store, f"{split}/", shard)
                if not shard.place:
                    expected[f"{split}/{shard.name}"] = shard.sha256
        for name, digest in expected.items():
            if sha256(self._store.get(name)) != digest:
                raise CorruptError(f"{self._store.url}/{name} has another sha256")
