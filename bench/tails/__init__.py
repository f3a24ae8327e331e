"""What bookkeeping beside a step costs its thread: the profile's clock, and a row for the trackers.

Baselines are the constants that `tapir plan` counts with (planning.tails.py).
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.support.rows import bench_row
from bench.support.sizes import sized
from planning.tails import BOOKED, ROW
from training.profiling.clock import HostClock
from training.run.trackers.writer import Trackers

ROUNDS, MARKS, ROWS = sized(5, 2), sized(100_000, 100), sized(500, 5)
FIGURES = 60
"""Figures of a row."""


def run() -> list[dict[str, Any]]:
    """Seconds of the step's thread; ratio = the planned constant over them."""
    spent: dict[str, float] = defaultdict(float)

    def book(owner: object, seconds: float) -> None:
        spent[str(owner)] += seconds

    clock = HostClock(book)
    booked = [_each(lambda: clock.mark("forward"), MARKS) for _ in range(ROUNDS)]
    row = {"step": 1, **{f"figure_{i}": i / 7 for i in range(FIGURES)}}
    with tempfile.TemporaryDirectory() as name:
        trackers = Trackers(Path(name), {}, "tensorboard")
        trackers.begin(0)
        with Path(name, "metrics.jsonl").open("a", encoding="utf-8") as file:

            def send() -> None:
                file.write(json.dumps(row) + "\n")
                file.flush()
                trackers.row(row)

            sent = [_each(send, ROWS) for _ in range(ROUNDS)]
        trackers.close()
    rows = (("a border of the profile", booked, BOOKED), ("a row for the trackers", sent, ROW))
    return [
        bench_row(name, min(times), "s", f"{planned:g} s are planned", [planned / t for t in times])
        for name, times, planned in rows
    ]


def _each(call: Callable[[], None], times: int) -> float:
    """Seconds of a call, the mean of many."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times
