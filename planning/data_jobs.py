"""`tapir plan --data N`: hours, requests, bytes and dollars of packing and tokenizing N pairs.

Requests follow the jobs' code: a lease, a look at the marker, outputs, a marker and a ledger for
each task; at the end one read of each shard's index. Prices of requests and storage are the list
prices of Amazon S3 Standard, us-east-1. Imports no torch.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from core.config import check
from core.storage.ranged_file import PART
from data_pipeline.config import PackConfig, TokenizeConfig
from data_pipeline.jobs.ledger import ROWS

PAGE = 1000
"""Names of a page of a listing."""
_UPLOAD = 16 * 2**20
"""Bytes of a part of an upload; smaller objects are one request."""
_FACTS = 90
"""Bytes a pair of catalogue, indexes and ids: measured with captions of 16 letters."""
_TOKENS = 2600
"""Bytes a pair of tokens: 1,024 codes and a caption."""
_PAGE_SECONDS, _LISTING = 0.05, 0.05
"""Seconds of a page, and the fraction of its time that a worker lists what is done."""
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_DOLLARS = {"GET": 0.4e-6, "HEAD": 0.4e-6, "PUT": 5e-6, "LIST": 5e-6}
"""Dollars a request."""
_STORAGE = 0.023e-9
"""Dollars a byte and month."""
_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Sizes and rates of the data jobs, for --data."""

    data: str = ""
    """Pairs to pack and tokenize, e.g. 250M; takes no preset."""
    workers: int = 1
    """Workers of each job."""
    in_place: bool = False
    """Tars stay where they are, and pack writes no copy."""
    pair_bytes: int = 30_000
    """Bytes of a pair in its archive."""
    archive_pairs: int = 10_000
    """Pairs of an archive; img2dataset's default."""
    pack_rate: float = 600.0
    """Pairs a second of a pack worker: one thread, JPEGs of 30 kB, folder to folder; `python -m
    bench pack` measures this machine's."""
    pack_cost: float = 0.1
    """Dollars a pack worker and hour: 2 cores."""
    token_rate: float = 1000.0
    """Pairs a second of a token worker: expected of an H100 in bf16, not measured."""
    token_cost: float = 4.0
    """Dollars a token worker and hour: an H100."""

    def problems(self) -> list[str]:
        return [
            f"--{name.replace('_', '-')} {value} must be a positive finite number"
            for name, value in vars(self).items()
            if name not in ("data", "in_place") and not 0 < value < math.inf
        ]

    def unused(self) -> list[str]:
        """Problems of flags that are given without --data."""
        default = DataFlags()
        changed = [name for name, value in vars(self).items() if value != getattr(default, name)]
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        return [f"{flags}: for data jobs; add --data N, or leave it out"] if flags else []


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """What one job takes."""

    name: str
    tasks: int
    hours: float
    read_bytes: float
    written_bytes: float
    requests: dict[str, int]
    worker_dollars: float
    request_dollars: float
    storage_dollars: float
    """A month, of what it writes."""


def pairs_of(text: str) -> int:
    """`250M` -> 250,000,000. Raises: ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text)
    pairs = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    check([] if pairs else [f"--data {text} must be a number of pairs, such as 250M or 10k"])
    return pairs


def plan_data(pairs: int, flags: DataFlags) -> list[JobPlan]:
    """Plan pack and tokenize, with the default sizes of blocks and shards.

    Raises: ConfigError with every problem of the flags.
    """
    check(flags.problems())
    return [_pack(pairs, flags), _tokenize(pairs, flags)]


def shards_of_archive(flags: DataFlags) -> tuple[float, float]:
    """Expected shards, or indexes of a tar in place, of an archive in train and validation."""
    config, count = PackConfig(), flags.archive_pairs
    if flags.in_place:
        draws = -(-count // config.block)
        return 1.0, 1 - (1 - config.validation) ** draws
    held_out = round(count * config.validation)
    return -(-(count - held_out) // config.shard_pairs), -(-held_out // config.shard_pairs)


def pack_requests(archives: float, shards: float, flags: DataFlags) -> Counter[str]:
    """Requests of the tasks of a pack job, each with rejects, and of its end; without listings."""
    size = flags.pair_bytes * flags.archive_pairs
    requests: dict[str, float] = {}
    requests["HEAD"] = 2 + 1  # the archive, before and when it is opened; the marker
    requests["PUT"] = 5 + shards  # lease, catalogue, rejects, marker, ledger; indexes
    requests["GET"] = -(-size // PART) + shards + 1 + 1 / ROWS  # the end: indexes, catalogue
    if not flags.in_place:
        requests["HEAD"] += shards
        requests["PUT"] += shards * _puts(size / shards)
    return Counter({name: math.ceil(archives * count) for name, count in requests.items()})


def token_requests(tasks: float, pairs: int, flags: DataFlags) -> Counter[str]:
    """Requests of the tasks of a token job, and of its end; without listings."""
    requests: dict[str, float] = {}
    requests["HEAD"] = 1 + 1  # the marker; the tar
    requests["PUT"] = 4 + _puts(pairs / tasks * _TOKENS)  # lease, index, marker, ledger; the tar
    requests["GET"] = 1 + 1 / ROWS  # the end
    if flags.in_place:
        requests["HEAD"] += 1
        requests["GET"] += pairs / tasks / PackConfig().block
    else:
        requests["GET"] += 1
    return Counter({name: math.ceil(tasks * count) for name, count in requests.items()})


def _pack(pairs: int, flags: DataFlags) -> JobPlan:
    archives, shards = pairs / flags.archive_pairs, sum(shards_of_archive(flags))
    requests, seconds = pack_requests(archives, shards, flags), pairs / flags.pack_rate
    requests["LIST"] += math.ceil(archives / PAGE)
    lease, tasks = PackConfig().lease_seconds, math.ceil(archives)
    read = float(pairs * flags.pair_bytes)
    written = pairs * _FACTS + (0 if flags.in_place else read)
    return _job("pack", tasks, requests, seconds, lease, (read, written), flags, flags.pack_cost)


def _tokenize(pairs: int, flags: DataFlags) -> JobPlan:
    tasks = math.ceil(pairs / flags.archive_pairs * sum(shards_of_archive(flags)))
    requests, seconds = token_requests(tasks, pairs, flags), pairs / flags.token_rate
    moved = float(pairs * flags.pair_bytes), float(pairs * _TOKENS)
    lease = TokenizeConfig().lease_seconds
    return _job("tokenize", tasks, requests, seconds, lease, moved, flags, flags.token_cost)


def _job(
    name: str,
    tasks: int,
    requests: Counter[str],
    seconds: float,
    lease: float,
    moved: tuple[float, float],
    flags: DataFlags,
    cost: float,
) -> JobPlan:
    """`seconds` of one worker for all; `moved`: bytes read and written."""
    pages = -(-tasks // PAGE)
    requests["PUT"] += int(seconds / (lease / 4))  # renewals of leases
    requests["LIST"] += tasks + int(min(tasks * pages, seconds * _LISTING / _PAGE_SECONDS))
    workers = min(flags.workers, tasks)
    return JobPlan(
        name=name,
        tasks=tasks,
        hours=seconds / workers / _HOUR,
        read_bytes=moved[0],
        written_bytes=moved[1],
        requests=dict(sorted(requests.items())),
        worker_dollars=seconds / _HOUR * cost,
        request_dollars=sum(_DOLLARS[kind] * count for kind, count in requests.items()),
        storage_dollars=_STORAGE * moved[1],
    )


def _puts(size: float) -> int:
    """Requests that write an object."""
    return 1 if size < _UPLOAD else 2 + math.ceil(size / _UPLOAD)


def data_json(flags: DataFlags) -> dict[str, Any]:
    """The whole plan."""
    pairs = pairs_of(flags.data)
    jobs = {job.name: dict(vars(job)) for job in plan_data(pairs, flags)}
    return {"pairs": pairs, "flags": dict(vars(flags)), "jobs": jobs}


def describe_data(flags: DataFlags) -> str:
    """Format a plan for the terminal."""
    pairs = pairs_of(flags.data)
    lines = [f"{pairs:,} pairs, {flags.workers} workers{' in place' * flags.in_place}"]
    for job in plan_data(pairs, flags):
        asked = ", ".join(f"{count:,} {kind}" for kind, count in job.requests.items())
        lines += [
            f"{job.name}: {job.hours:.1f} hours for {job.tasks:,} tasks; "
            f"${job.worker_dollars:,.0f} of workers, ${job.request_dollars:,.2f} of requests, "
            f"${job.storage_dollars:,.2f} a month of storage",
            f"  reads {job.read_bytes / 1e9:,.1f} GB, writes {job.written_bytes / 1e9:,.1f} GB; "
            f"{asked}",
        ]
    rate, tokens = flags.pack_rate, flags.token_rate
    lines.append(f"at {rate:g} and {tokens:g} pairs a second and worker; see --help of the rates")
    return "\n".join(lines)
