"""`tapir plan --data 250M`: hours, requests, bytes and dollars of packing that many pairs.

A worker is as slow as the slower of its cores and its link. Requests are those of packing/unit.py
and jobs/: reads in parts of 8 MiB, a HEAD an archive, its shards with their indexes and ETags, its
rejects, catalogue, marker, ledger and leases; then the finisher's read of each index.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from core.storage.ranged_file import PART

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_JOB = 6
"""Puts and deletes of a unit besides its shards: lease, renewals, marker, ledger, catalogue."""
_ASKED = 3
"""GETs, HEADs and listings of a unit besides the archive's parts."""
CATALOGUE_BYTES = 150
"""Of a pair in the catalogue, compressed."""


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The pairs and the workers of `plan --data`."""

    workers: int = 64
    """Workers of the job."""
    worker_cores: int = 4
    """Cores of a worker (pack --threads)."""
    pair_kilobytes: float = 40.0
    """Kilobytes of a picture and its captions."""
    pair_ms: float = 5.7
    """Core milliseconds of a pair: 351 pairs/s of 27 kB by 2 threads; `bench pack` measures it."""
    archive_pairs: int = 10_000
    """Pairs of a source archive (img2dataset: 10,000)."""
    shard_pairs: int = 2000
    """Pairs of a shard (pack --shard-pairs)."""
    in_place: bool = False
    """Plan for pack --in-place."""
    link_megabytes: float = 100.0
    """MB/s between a worker and the store, each way."""
    core_hour: float = 0.05
    """Dollars of a core for an hour."""
    get_dollars: float = 0.0004
    """Dollars of 1,000 GETs and HEADs."""
    put_dollars: float = 0.005
    """Dollars of 1,000 PUTs and listings."""

    def problems(self) -> list[str]:
        """Every problem at once."""
        counts = ("workers", "worker_cores", "archive_pairs", "shard_pairs")
        amounts = ("pair_kilobytes", "pair_ms", "link_megabytes")
        problems = [f"--{name} must be at least 1" for name in counts if getattr(self, name) < 1]
        problems += [
            f"--{name} must be positive" for name in amounts if not getattr(self, name) > 0
        ]
        prices = ("core_hour", "get_dollars", "put_dollars")
        problems += [f"--{n} must not be negative" for n in prices if not getattr(self, n) >= 0]
        return [problem.replace("_", "-") for problem in problems]


def pairs_of(text: str) -> int:
    """The number of pairs in a text such as 250M; 0 if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    return round(float(match[1]) * _UNITS[match[2]]) if match else 0


def plan_data(pairs: int, flags: DataFlags) -> dict[str, Any]:
    """The plan, as --json prints it. Units: hours, bytes, requests, dollars."""
    archives = math.ceil(pairs / flags.archive_pairs)
    size = round(pairs * flags.pair_kilobytes * 1000)
    parts = archives * math.ceil(size / archives / PART)
    shards = 0 if flags.in_place else archives * math.ceil(flags.archive_pairs / flags.shard_pairs)
    indexes = 2 * archives if flags.in_place else shards + archives  # validation has one a unit
    written = pairs * CATALOGUE_BYTES + (0 if flags.in_place else size)
    gets = parts + archives * _ASKED + indexes * (1 if flags.in_place else 2)
    puts = archives * _JOB + indexes * (1 if flags.in_place else 2)
    cores = flags.workers * flags.worker_cores
    core_hours = pairs * flags.pair_ms / 1000 / 3600
    link_hours = max(size, written) / (flags.workers * flags.link_megabytes * 1e6) / 3600
    hours = max(core_hours / cores, link_hours)
    requests = gets / 1000 * flags.get_dollars + puts / 1000 * flags.put_dollars
    machines = hours * cores * flags.core_hour
    return {
        "pairs": pairs,
        "archives": archives,
        "hours": hours,
        "limit": "cores" if core_hours / cores >= link_hours else "link",
        "pairs_per_second": pairs / hours / 3600,
        "bytes_read": size,
        "bytes_written": written,
        "gets": gets,
        "puts": puts,
        "dollars": {"machines": machines, "requests": requests, "all": machines + requests},
    }


def data_text(plan: dict[str, Any], flags: DataFlags) -> str:
    """The plan for the terminal."""
    how, dollars = "in place" if flags.in_place else "copied", plan["dollars"]
    read, written = plan["bytes_read"] / 1e12, plan["bytes_written"] / 1e12
    return (
        f"{plan['pairs']:,} pairs of {plan['archives']:,} archives, {how}, by {flags.workers} "
        f"workers of {flags.worker_cores} cores:\n"
        f"  {plan['hours']:.1f} hours at {plan['pairs_per_second']:,.0f} pairs/s, by the "
        f"{plan['limit']}\n"
        f"  {read:.2f} TB read, {written:.2f} TB written\n"
        f"  {plan['gets']:,} GETs and HEADs, {plan['puts']:,} PUTs and listings\n"
        f"  {dollars['all']:,.0f} dollars: {dollars['machines']:,.0f} for cores, "
        f"{dollars['requests']:,.0f} for requests; storage and traffic between regions come on top"
    )
