"""The order of 250 million records: from a saved position to its batch, and reads of the store.

An index alone, no records: 2,500 shards of 100,000 in blocks of 128, 1024 lanes of 8-block windows.
A child process measures time and memory from the state; then every rank of four world sizes walks
one epoch through the stream's own planning of windows, and the records that it would fetch are
counted. Each figure is taken once: its spread is the figure itself.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import psutil

from bench.support.children import call_command, child_environment
from bench.support.rows import bench_row
from bench.support.sizes import sized
from data_pipeline.config import OrderConfig
from data_pipeline.streaming.order import LaneOrder
from data_pipeline.streaming.stream import Chunk, Windows, chunks_of

SHARDS, RECORDS, BLOCK = sized(2500, 300), 100_000, 128
ORDER = OrderConfig(lanes=sized(1024, 64), shuffle_buffer=8)
BATCH = ORDER.lanes
WORLDS = sized((1, 8, 64, 1024), (1, 8))
POSITIONS = sized(((0, 0), (0, 200_000), (3, 123_456), (17, 1)), ((3, 123_456),))
"""(epoch, step) of saved states."""


class CountedSource:
    """Counts the blocks that are requested; holds no records."""

    variants = 1
    fingerprint = ""

    def __init__(self, sizes: np.ndarray) -> None:
        self.sizes = sizes
        self.blocks = self.records = 0

    def submit(self, fill: Any, place: int, block: int) -> "Future[Any]":
        """Replaces the stream's fetching threads."""
        self.blocks += 1
        self.records += int(self.sizes[block])
        return Future()

    def read(self, block: int, variant: int = 0) -> Any:
        """Never called: `submit` runs nothing."""

    def buffer(self, sizes: Any, free: Any = None) -> Any:
        """There is nothing to hold."""

    def empty(self) -> Any:
        """Never called."""


def sizes_250m() -> np.ndarray:
    """Records of each block."""
    rest = RECORDS % BLOCK
    shard = [BLOCK] * (RECORDS // BLOCK) + ([rest] if rest else [])
    return np.tile(np.asarray(shard, np.int64), SHARDS)


def run() -> list[dict[str, Any]]:
    """Rows: seconds and megabytes from a state to its batch; reads an epoch over records used."""
    rows = []
    for epoch, step in POSITIONS:
        command = call_command("bench.order:position", epoch, step)
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "env": child_environment()}
        done = subprocess.run(command, text=True, check=True, **piped)
        figures = json.loads(done.stdout.splitlines()[-1])
        assert figures["seconds"] < 1 and figures["megabytes"] < 100, figures
        where = f"state to batch, epoch {epoch} step {step}"
        rows.append(bench_row(where, figures["seconds"], "s", "1 s", [1 / figures["seconds"]]))
        rows.append(
            bench_row(
                f"{where}, more memory",
                figures["megabytes"],
                "MB",
                "100 MB",
                [100 / figures["megabytes"]],
            )
        )
    source = CountedSource(sizes_250m())
    order = LaneOrder(source.sizes, 0, BATCH, ORDER)
    for world in WORLDS:
        began = time.perf_counter()
        value = amplification(source, order, world, BATCH)
        print(f"{world} ranks: {value:.4f} in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        assert value <= 1.05, value
        rows.append(
            bench_row(
                f"records fetched over used, {world} ranks", value, "x", "1 read each", [1 / value]
            )
        )
    return rows


def amplification(source: CountedSource, order: LaneOrder, world: int, batch: int) -> float:
    """Records that all ranks fetch in an epoch over those that they train on."""
    source.blocks = source.records = 0
    share = order.lanes // world
    for rank in range(world):
        pool: Any = source
        windows = Windows(source, order, range(rank * share, (rank + 1) * share), pool)
        for chunk in _epoch(order):
            windows.plan(chunk)
            windows.forget()
    return source.records / (order.steps(0) * batch)


def _epoch(order: LaneOrder) -> list[Chunk]:
    chunks: list[Chunk] = []
    for chunk in chunks_of(order, 0, 0, 32):
        if chunk.epoch:
            return chunks
        chunks.append(chunk)
    return chunks


def position(epoch: int, step: int) -> None:
    """Print how long the batch of a position takes, from the index in memory, and its memory."""
    sizes = sizes_250m()
    process = psutil.Process()
    before = process.memory_info().rss
    began = time.perf_counter()
    order = LaneOrder(sizes, 0, BATCH, ORDER)
    places = order.places(epoch, step, range(ORDER.lanes))
    seconds = time.perf_counter() - began
    more = (process.memory_info().rss - before) / 1e6
    assert len(places) == BATCH
    print(json.dumps({"seconds": seconds, "megabytes": more}))
