"""A mixture of three sets beside one set: CPU a record, and the arithmetic of its shares.

The sets are token sets in a folder, of the paper's records (1,024 codes, 256 text ids). Both read
as many records in turns, in one process, with the same batch and lanes; CPU is that of all threads.
The shares are those of 1024 lanes and three sets: a step, a resume, and by how many records the
lanes of a set differ at most.
"""

import json
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.synthetic import write_tokens
from core.storage.store import FolderStore
from data_pipeline.config import OrderConfig
from data_pipeline.formats.manifest import NAME
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.streaming.mixed_source import open_source
from data_pipeline.streaming.mixture import open_stream
from data_pipeline.streaming.shares import Shares

SETS, SHARDS, RECORDS, BLOCK = ("a", "b", "c"), sized(8, 1), sized(4096, 256), sized(128, 16)
SHARES = ("0.5", "0.3", "0.2")
BATCH, ORDER = sized(256, 32), OrderConfig(lanes=sized(32, 4))
ROUNDS, STEPS = sized(7, 1), sized(120, 4)
LANES, WALK = sized(1024, 64), sized(20_000, 200)


def run() -> list[dict[str, Any]]:
    """Rows: the CPU of a mixture over that of one set; microseconds of the shares."""
    folder = cache("mixture")
    for name in SETS:
        store = FolderStore(folder / name)
        if not store.exists(f"train/{NAME}"):
            write_tokens(store, SHARDS, RECORDS, BLOCK, seed=name)
    mixture = ",".join(f"{folder / n}:{share}" for n, share in zip(SETS, SHARES, strict=True))
    one, several = [], []
    for _ in range(ROUNDS):
        one.append(_cpu_a_record(str(folder / SETS[0])))
        several.append(_cpu_a_record(mixture))
    print(json.dumps({"one": one, "several": several}), file=sys.stderr)
    ratios = [a / b for a, b in zip(one, several, strict=True)]
    row = bench_row("CPU a record", 1e6 * float(np.median(several)), "us", "one set", ratios)
    return [row, *_shares()]


def _cpu_a_record(data: str) -> float:
    """Seconds of all threads for each record of STEPS batches, without the first."""
    stream = open_stream(open_source(TokenSource, data, "train"), seed=0, batch=BATCH, order=ORDER)
    batches = iter(stream)
    next(batches)
    began = time.process_time()
    read = sum(len(next(batches)[0]) for _ in range(STEPS))
    seconds = time.process_time() - began
    batches.close()
    return seconds / read


def _shares() -> list[dict[str, Any]]:
    order = Shares([Fraction(share) for share in SHARES], 0, LANES, LANES)
    drawn, apart = order.drawn(0), 0
    for step in range(WALK):
        drawn = drawn + order.counts(step)
        apart = max(apart, int(np.ptp(drawn, axis=0).max()))
    seconds = _seconds(lambda: [order.counts(step) for step in range(WALK)]) / WALK
    resume = _seconds(lambda: order.drawn(WALK))
    return [
        bench_row(
            f"shares of a step, {LANES} lanes", 1e6 * seconds, "us", "1 ms", [1e-3 / seconds]
        ),
        bench_row("shares at a resume", 1e3 * resume, "ms", "1 s", [1 / resume]),
        bench_row("records by which lanes differ", apart, "records", "8", [8 / max(apart, 1)]),
    ]


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
