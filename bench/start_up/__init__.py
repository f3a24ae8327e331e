"""CPU seconds and store requests of a world's start, against the model of `tapir plan`.

Light ranks (no model, real process groups and a real TCPStore) start in worlds of 2 to 64. The
model is fitted to them, and predicts each of them and a larger world. Ranks share the cores, so
CPU seconds count, not wall time; gloo's loops, which wake 100 times a second however long a world
waits, and requests of ranks that wait are left out of the prediction. A row's ratio is the
predicted over the measured value.
"""

import statistics
from typing import Any

from bench.support.rows import Row, bench_row
from bench.support.sizes import cache, sized
from bench.support.synthetic import write_tokens
from core.errors import ConfigError
from core.storage.store import FolderStore
from parallel.config import MeshConfig
from planning.start_up.light_ranks import LightRun, run_light_ranks
from planning.start_up.model import (
    MEASURED,
    Constants,
    Measured,
    fitted,
    rank_seconds,
    store_requests,
    store_seconds,
)

WORLDS, PASSES = sized((2, 4, 8, 16, 32, 64), (2, 4)), sized(5, 1)
_WAITING = ("check", "compare_set")
"""Requests of ranks that wait for others, or that only one rank makes."""
_ADDS = 3
"""Sums that a rank adds to; one that waits for long adds another."""


def run(ranks: int = 0) -> list[Row]:
    """Three rows for each world, and one a fitted constant; `ranks` is that of a larger world,
    outside of the fit."""
    if ranks == 1 or ranks < 0:
        raise ConfigError("--ranks is a world of at least 2 ranks")
    place = cache("start-up") / "data"
    for split in ("train", "validation"):
        write_tokens(FolderStore(place), shards=2, count=16, block=8, grid=4, text=4, split=split)
    rows = [_measured(world, str(place)) for world in WORLDS]
    constants = fitted([row for row, _ in rows])
    if ranks:
        rows.append(_measured(ranks, str(place)))
    fits = [_fit(name, constants) for name in ("rank", "rank_level", "store", "request")]
    return [row for measured, run in rows for row in _rows(measured, run, constants)] + fits


def _fit(name: str, constants: Constants) -> Row:
    """A constant that follows from these worlds, over the one of the model."""
    value, known = getattr(constants, name), getattr(MEASURED, name)
    return bench_row(f"fitted: {name}", value, "s", f"in the model {known:.4g}", [value / known])


def _measured(world: int, place: str, passes: int = PASSES) -> tuple[Measured, LightRun]:
    """The medians of some passes, and the last pass."""
    runs = [run_light_ranks(MeshConfig(data=world), place=place) for _ in range(passes)]
    ranks = [statistics.median(row["seconds"]["rank"] for row in run.rows) for run in runs]
    requests = [sum(run.requests.values()) / (world - 1) * world for run in runs]
    measured = Measured(
        world=world,
        rank=statistics.median(ranks),
        store=statistics.median(run.rows[0]["seconds"]["store"] for run in runs),
        requests=round(statistics.median(requests)),
    )
    return measured, runs[-1]


def _rows(measured: Measured, run: LightRun, constants: Constants) -> list[dict[str, Any]]:
    world = measured.world
    counts = {name: n for name, n in run.requests.items() if name not in _WAITING}
    counts["add"] = _ADDS * (world - 1)
    requests = sum(counts.values()) / (world - 1)
    predictions = (
        ("CPU of a rank", "s", rank_seconds(world, constants), measured.rank),
        (
            "CPU of the store",
            "s",
            store_seconds(measured.requests, constants),
            measured.store,
        ),
        ("requests of a rank", "requests", store_requests(world, 2), requests),
    )
    return [
        bench_row(f"{world} ranks: {name}", value, unit, f"measured {real:.4g}", [value / real])
        for name, unit, value, real in predictions
    ]
