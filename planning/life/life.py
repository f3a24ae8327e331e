"""One world's life: a job that starts, loses ranks, is preempted, is started again, and ends."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from core.config import check
from core.errors import TapirError
from core.launch_environment import free_port
from planning.life.config import LifePlan
from planning.life.counts import COUNTED, SAVE
from planning.life.job import Job
from planning.start_up.store_proxy import StoreProxy

POLLS = "check"
"""The store request of a rank that waits: as many as it has time for."""
RENDEZVOUS, CONNECTIONS = "rendezvous store requests", "open connections"
PHASES = ("a start", "a checkpoint", "the end")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the ranks of a world."""

    median: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Life:
    """What the life of one world took."""

    plan: LifePlan
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of its parts, with whatever else this machine does."""
    counts: dict[str, Spread] = field(default_factory=dict)
    """What a rank asks of others, by name."""
    with_time: dict[str, Spread] = field(default_factory=dict)
    """What depends on time: CPU seconds of a rank in the last start of the job, and its polls."""


def live(plan: LifePlan) -> Life:
    """Let one world of light ranks live on this machine.

    Raises: ConfigError for an impossible plan; TapirError if the job ends otherwise than planned,
    or if anything of the run is missing, double or wrong at its end.
    """
    check(plan.problems())
    with TemporaryDirectory(prefix="tapir-life-") as name, StoreProxy(free_port()) as proxy:
        job = Job(plan, Path(name), proxy.port, proxy.store_port)
        job.live()
        job.check()
    if proxy.failure:
        raise TapirError(f"the requests of torch's TCPStore cannot be counted: {proxy.failure}")
    clients = [client for client in proxy.stores[-1] if client]
    polls = [client.pop(POLLS, 0) for client in clients]
    counts = {RENDEZVOUS: spread(sum(client.values()) for client in clients)}
    counts[CONNECTIONS] = spread(row["connections"] for row in job.rows)
    for kind in COUNTED:
        for phase, change in zip(PHASES, (_at_start, _a_checkpoint, _at_end), strict=True):
            counts[f"{kind}, {phase}"] = spread(change(row["marks"], kind) for row in job.rows)
    cpu = [row["cpu"] for row in job.rows]
    with_time = {
        "CPU seconds of a rank": spread(row["rank"] for row in cpu),
        "CPU seconds of gloo's idle loops": spread(row["loops"] for row in cpu),
        "polls of the rendezvous store": spread(polls),
    }
    return Life(plan=plan, seconds=job.seconds(), counts=counts, with_time=with_time)


def spread(values: Iterable[float]) -> Spread:
    """Median and maximum."""
    values = list(values)
    return Spread(median=statistics.median(values), worst=max(values))


def _at_start(marks: list[dict[str, Any]], kind: str) -> int:
    """From the start of a process to its first step."""
    return int(marks[0]["counts"][kind])


def _a_checkpoint(marks: list[dict[str, Any]], kind: str) -> float:
    """From one checkpoint to the next, and the step between; the median, without the last one's."""
    saves = [mark["counts"][kind] for mark in marks if mark["what"] == SAVE][:-1]
    return float(statistics.median(after - before for before, after in pairwise(saves)))


def _at_end(marks: list[dict[str, Any]], kind: str) -> int:
    """From the last save but one: the last step, a validation, a checkpoint, and the model."""
    *_, before, _, end = (mark["counts"][kind] for mark in marks)
    return int(end - before)
