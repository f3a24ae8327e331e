"""What a pack job costs beside its work: decoding, perceptual hashes and digests of photographs.

CPU a pair       of one worker from folder to folder, over the same work on pairs in memory
workers          pairs/s of two workers over one, a core each, in a folder and, beside it, in
                 SeaweedFS; what the machine gives: two processes of the work alone over one
memory           highest resident set of a worker, and its last third over its second
webdataset       CPU a pair of the webdataset library, which copies pictures without a look

Rounds take turns. Every process has imported its modules before its clock starts.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.pack.photographs import archives, kinds
from bench.support.children import child_environment, module_command
from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from cluster.object_server import object_server
from core.storage.store import FolderStore, open_store

EFFICIENCY, SCALING, MEGABYTES = 0.9, 1.85, 600.0
"""Targets."""
BUCKET = "bench-pack"
ROUNDS = 3
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
}
"""Else glibc gives the pages of each picture back, more often in one process than in another."""
Result = dict[str, Any]


def run() -> list[dict[str, Any]]:
    """Rows; ratio > 1 is better than the baseline."""
    rows: list[dict[str, Any]] = []
    for kind in kinds():
        source, out = archives(kind), cache("pack") / "out"
        rounds = [_round(source, str(out)) for _ in range(sized(ROUNDS, 1))]
        rows += _rows(kind.name, rounds)
        shutil.rmtree(out, ignore_errors=True)
    with _seaweed() as environment:
        kind = kinds()[0]
        url = _stored(archives(kind))
        store = [
            {n: _pack(url, f"s3://{BUCKET}/out-{n}-{i}", n, environment) for n in (1, 2)}
            for i in range(sized(3, 1))
        ]
    rows.append(_scaling(f"{kind.name}, SeaweedFS", store))
    return rows


def _round(source: Path, out: str) -> dict[Any, list[Result]]:
    """Each measurement once, one after another."""
    bare = ["bare", str(source), out, "0/1", "1"]
    results: dict[Any, list[Result]] = {
        "bare": _together([bare]),
        "two bare": _together([bare, bare]),
        "webdataset": _together([["webdataset", str(source), f"{out}/webdataset", "0/1", "1"]]),
    }
    for workers in (1, 2):
        shutil.rmtree(out, ignore_errors=True)
        results[workers] = _pack(str(source), out, workers)
    shutil.rmtree(out, ignore_errors=True)
    return results


def _rows(name: str, rounds: list[dict[Any, list[Result]]]) -> list[dict[str, Any]]:
    bare, one = ([_each(results[what][0]) * 1e3 for results in rounds] for what in ("bare", 1))
    copied = [_each(results["webdataset"][0]) * 1e3 for results in rounds]
    ratios = [b / o / EFFICIENCY for b, o in zip(bare, one, strict=True)]
    peaks = [max(row["peak"] for row in results[2]) for results in rounds]
    growth = [results[1][0]["growth"] for results in rounds]
    middle = statistics.median
    return [
        bench_row(f"CPU a pair, {name}", middle(one), "ms", "the work alone / 0.9", ratios),
        bench_row(f"CPU a pair of the work alone, {name}", middle(bare), "ms", "itself", [1.0]),
        bench_row(
            f"CPU a pair that webdataset copies unread, {name}",
            middle(copied),
            "ms",
            "pack",
            [o / c for o, c in zip(one, copied, strict=True)],
        ),
        _scaling(name, rounds),
        bench_row(
            f"pairs/s of 2 processes of the work alone, {name}",
            middle([sum(_rate(row) for row in results["two bare"]) for results in rounds]),
            "pairs/s",
            "1 process",
            [
                sum(_rate(row) for row in results["two bare"]) / _rate(results["bare"][0])
                for results in rounds
            ],
        ),
        bench_row(
            f"memory of a worker, {name}", max(peaks), "MB", "600", [MEGABYTES / p for p in peaks]
        ),
        bench_row(
            f"memory, last third over the second, {name}",
            middle(growth),
            "",
            "flat",
            [1 / value for value in growth],
        ),
    ]


def _scaling(name: str, rounds: list[Any]) -> dict[str, Any]:
    speeds = {n: [_speed(results[n]) for results in rounds] for n in (1, 2)}
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    return bench_row(
        f"pairs/s of 2 workers, {name}",
        statistics.median(speeds[2]),
        "pairs/s",
        f"1 worker x {SCALING}",
        [ratio / SCALING for ratio in ratios],
    )


def _each(row: Result) -> float:
    return float(row["cpu"]) / float(row["pairs"])


def _speed(rows: list[Result]) -> float:
    """Pairs a second until the set is finished; each worker counts the pairs of the whole set."""
    return max(_rate(row) for row in rows)


def _rate(row: Result) -> float:
    return float(row["pairs"]) / float(row["seconds"])


def _pack(
    source: str, dest: str, workers: int, environment: dict[str, str] | None = None
) -> list[Result]:
    jobs = [["pack", source, dest, f"{i}/{workers}", "1"] for i in range(workers)]
    return _together(jobs, environment)


def _together(jobs: list[list[str]], environment: dict[str, str] | None = None) -> list[Result]:
    """Start processes, let them work at the same time once all are ready, and read their rows.

    Each has a core of its own: else one worker's threads use two.
    """
    children = [
        subprocess.Popen(
            module_command("bench.pack.child", *job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment({**os.environ, **_SETTINGS, **(environment or {})}),
        )
        for job in jobs
    ]
    pipes = [(child.stdin, child.stdout) for child in children]
    cores = sorted(os.sched_getaffinity(0))
    for i, (child, (_, output)) in enumerate(zip(children, pipes, strict=True)):
        assert output is not None and output.readline() == "ready\n"
        os.sched_setaffinity(child.pid, {cores[i % len(cores)]})  # threads of its work inherit it
    for given, _ in pipes:
        assert given is not None
        given.write("\n")
        given.flush()
    rows = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    print(json.dumps([jobs[0][0], rows]), file=sys.stderr)
    return rows


@contextmanager
def _seaweed() -> Iterator[dict[str, str]]:
    shutil.rmtree(cache("pack") / "weed", ignore_errors=True)
    with object_server(cache("pack") / "weed", BUCKET) as server, server.credentials():
        yield server.environment


def _stored(folder: Path) -> str:
    """Copy the archives to the store."""
    url = f"s3://{BUCKET}/source"
    local, store = FolderStore(folder), open_store(url)
    for name in local.names():
        store.put(name, local.get(name))
    return url
