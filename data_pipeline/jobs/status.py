"""Progress of a job over all its workers: of its ledgers while it runs, then of its results.

A token job is described by its request.json, any other job by job.json. Pairs per second are the
sum over the workers that hold a lease: each publishes its pairs and seconds since it began.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from core.errors import CorruptError, InputError
from core.storage.store import Store
from data_pipeline.formats.manifest import (
    RAW,
    SPLITS,
    TOKENS,
    manifest_name,
    newest_manifests,
    read_json,
    read_manifest,
)
from data_pipeline.jobs.leases import read_leases
from data_pipeline.jobs.ledger import Record, finished_tasks
from data_pipeline.jobs.request import newest_version, request_name

JOB = "job.json"
_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class JobPart:
    """One folder of a job, as its first worker described it."""

    name: str
    prefix: str
    tasks: int
    pairs: int
    """0 if nobody knows before they are read."""
    result: str
    """The object that is written last."""


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """How far one folder of a job is."""

    part: str
    tasks: int
    tasks_done: int
    pairs: int
    """All pairs; while they are not known, an estimate from the finished tasks."""
    pairs_done: int
    """Pairs of finished tasks, plus the last reported progress of running ones."""
    rejects: dict[str, int]
    finished: bool
    """True if the result exists."""
    devices: dict[str, int]
    """Finished tasks by the device that made them, where records name one."""
    pairs_per_second: float
    """Over all workers that hold a lease here; 0 if none has reported."""
    workers: list[dict[str, Any]]
    """worker, holder and progress of each lease; a dead worker's lease stays until taken over."""

    @property
    def alive(self) -> list[dict[str, Any]]:
        """The leases of workers that are not known to be dead."""
        return [lease for lease in self.workers if not lease["dead"]]

    @property
    def hours_left(self) -> float | None:
        """At the workers' pace; None if it is not known."""
        if self.finished or not self.pairs_per_second or not self.pairs:
            return 0.0 if self.finished else None
        return (self.pairs - self.pairs_done) / self.pairs_per_second / _HOUR


def job_status(store: Store) -> list[PartStatus]:
    """Read the status of a job from its output store.

    Raises: InputError if there is none.
    """
    return [_status(store, part, kind) for part, kind in _parts(store)]


def _parts(store: Store) -> list[tuple[JobPart, str]]:
    """The parts of a job, and the format of its manifests; "" if it writes none."""
    if store.exists(JOB):
        body = read_json(store, JOB)
        parts, kind = body["parts"], RAW if body.get("job") == "pack" else ""
        return [(JobPart(name=name, **part), kind) for name, part in sorted(parts.items())]
    version = newest_version(store)
    if not version:
        raise InputError(
            f"there is no token job at {store.url}, nor another job of workers; start it, e.g. "
            "with `tapir tokenize`"
        )
    counts = read_json(store, request_name(version)).get("input")
    if not isinstance(counts, dict):
        raise InputError(f"{store.url} is not the place of a job of workers; give its output")
    return [
        (
            JobPart(
                name=split,
                prefix=f"{split}/",
                tasks=counts[split]["shards"],
                pairs=counts[split]["pairs"],
                result=f"{split}/{manifest_name(version)}",
            ),
            TOKENS,
        )
        for split in SPLITS
    ]


def _status(store: Store, part: JobPart, kind: str) -> PartStatus:
    leases = read_leases(store, part.prefix)
    if store.exists(part.result):
        count, rejects, devices = _of_manifests(store, part, kind)
        return PartStatus(
            part=part.name,
            tasks=part.tasks,
            tasks_done=part.tasks,
            pairs=count,
            pairs_done=count,
            rejects=rejects,
            finished=True,
            devices=devices,
            pairs_per_second=0.0,
            workers=leases,
        )
    rejects, devices = Counter[str](), Counter[str]()
    done = pairs = 0
    try:
        for _, record in finished_tasks(store, part.prefix):
            done += 1
            pairs += pairs_of(record)
            rejects.update(record.get("rejects", {}))
            if "numerics" in record:
                devices[record["numerics"]["device"]] += 1
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CorruptError(
            f"a record of {store.url}/{part.prefix} is damaged ({error}); run the command that "
            "made it with --again"
        ) from error
    running = sum(lease["progress"].get("pairs", 0) for lease in leases)
    estimate = round(pairs * part.tasks / done) if done else 0
    whole = part.pairs or max(estimate, pairs + running)
    return PartStatus(
        part=part.name,
        tasks=part.tasks,
        tasks_done=done,
        pairs=whole,
        pairs_done=min(whole, pairs + running),
        rejects=dict(rejects),
        finished=False,
        devices=dict(devices),
        pairs_per_second=sum(_pace(lease) for lease in leases),
        workers=leases,
    )


def pairs_of(record: Record) -> int:
    """Pairs of a finished task; the record of a token job has them in its first shard."""
    if "pairs" in record:
        return int(record["pairs"])
    return int(record["shards"][0]["samples"] + sum(record["rejects"].values()))


def _of_manifests(
    store: Store, part: JobPart, kind: str
) -> tuple[int, dict[str, int], dict[str, int]]:
    """Pairs, rejects and devices of a finished token split or raw set."""
    if kind == RAW:
        manifests = newest_manifests(store, RAW)
        pairs = sum(manifest.samples for manifest in manifests.values())
        return pairs, manifests["train"].rejects, {}
    if kind != TOKENS:
        return part.pairs, {}, {}
    manifest = read_manifest(store, part.prefix, TOKENS)
    devices: Counter[str] = Counter()
    for row in manifest.numerics:
        devices[row["device"]] += row["shards"]
    return part.pairs, manifest.rejects, dict(devices)


def _pace(lease: dict[str, Any]) -> float:
    """Pairs per second of a worker since it began; 0 for a dead one or an older version's."""
    worked = _worked(lease)
    return 0.0 if lease["dead"] or not worked else worked["pairs"] / worked["seconds"]


def _worked(lease: dict[str, Any]) -> dict[str, float]:
    """Pairs and seconds of a worker; empty if its lease has none."""
    worked = lease.get("worked")
    if not isinstance(worked, dict):
        return {}
    numbers = [worked.get(name) for name in ("pairs", "seconds")]
    if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
        return {}
    return worked if worked["seconds"] else {}


def describe_status(rows: list[PartStatus], cost_per_hour: float = 0.0) -> str:
    """Format a status for the terminal; `cost_per_hour` of one worker adds the cost of the rest."""
    lines = []
    for row in rows:
        state = "finished" if row.finished else "running" if row.alive else "nobody works on it"
        lines.append(
            f"{row.part}: {row.tasks_done} of {row.tasks} tasks, {row.pairs_done} of "
            f"{row.pairs} pairs, rejects {row.rejects or 'none'}; {state}"
        )
        if row.pairs_per_second:
            lines.append(f"  {_pace_text(row, cost_per_hour)}")
        if row.devices:
            made = (f"{count} by {device}" for device, count in sorted(row.devices.items()))
            lines.append(f"  tasks made: {', '.join(made)}")
        lines += [_worker_text(lease) for lease in row.workers]
    return "\n".join(lines)


def _pace_text(row: PartStatus, cost_per_hour: float) -> str:
    count, hours = len({lease["worker"] for lease in row.alive}), row.hours_left
    text = f"{row.pairs_per_second:.4g} pairs/s of {count} worker{'s' * (count != 1)}"
    if hours is None:
        return text
    cost = f", which cost {hours * count * cost_per_hour:.2f}" if cost_per_hour else ""
    return f"{text}: {hours:.1f} hours left{cost}"


def _worker_text(lease: dict[str, Any]) -> str:
    done, worked = lease["progress"], _worked(lease)
    pairs = f", {done.get('pairs', 0)} of {done['of']}" if done.get("of") else ""
    whole = f"; {worked['pairs']} pairs since it began" if worked else ""
    return (
        f"  worker {lease['worker']} on {lease['holder']['host']}"
        f"{' (dead)' if lease['dead'] else ''}: {done.get('shard', 'starting')}{pairs}{whole}"
    )
