"""A process of the benchmark: `make` some chunks of the catalogue, or `drop` its duplicates."""

import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from bench.dedup.rows import (
    UNIT_ROWS,
    chunk_rows,
    originals,
    part_path,
    planted_rows,
    source_of,
    write_chunk,
)
from bench.dedup.rows import drawn as drawn_rows
from core.storage.store import FolderStore
from data_pipeline.catalogue.duplicates import drop_duplicates
from data_pipeline.catalogue.near import is_flat
from data_pipeline.catalogue.parts import Part, put_catalogue
from data_pipeline.catalogue.verdict import DUPLICATE, KEPT, NEAR, Verdict
from data_pipeline.config import FilterConfig


def make(folder: Path, rows: int, worker: int, workers: int) -> None:
    """Write this worker's chunks that are not there yet."""
    for chunk in range(worker, rows // chunk_rows(), workers):
        last = (chunk + 1) * chunk_rows() // UNIT_ROWS - 1
        if not part_path(folder, last).exists():
            write_chunk(folder, chunk)


def drop(folder: Path, rows: int, work: Path) -> dict[str, Any]:
    """Drop duplicates, write the keep-list and what is left out; compare with what was planted."""
    paths = [part_path(folder, unit) for unit in range(rows // UNIT_ROWS)]
    seconds: dict[str, float] = {}
    with _peak_size(work) as peak:
        begin = time.monotonic()
        verdict = Verdict.all_kept(paths)
        drop_duplicates(verdict, FilterConfig(duplicates=True, near=3), work)
        seconds["duplicates"] = time.monotonic() - begin
        np.packbits(verdict.kinds == KEPT, bitorder="little").tofile(work / "keep-list.bin")
        parts = [
            Part(name=path.name, rows=UNIT_ROWS, bytes=path.stat().st_size, sha256="")
            for path in paths
        ]
        put_catalogue(FolderStore(work), parts, verdict.left_out())
        seconds["all"] = time.monotonic() - begin
    size = sum(part.bytes for part in parts)
    return {
        "seconds": seconds,
        "cpu": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "catalogue": size,
        "disk": size + peak[0],
        "counts": verdict.counts,
        "crowded": vars(verdict.crowded),
        **_check(verdict, rows),
    }


def _check(verdict: Verdict, rows: int) -> dict[str, int]:
    """Planted rows, and those of them that were missed."""
    planted = missed = chained = 0
    some, size = planted_rows(), chunk_rows()
    for chunk in range(1, rows // size):
        first = source_of(chunk) * size + np.arange(some)
        end = (chunk + 1) * size
        exact, near = np.arange(end - 2 * some, end - some), np.arange(end - some, end)
        missed += int((verdict.kinds[exact] != DUPLICATE).sum())
        missed += int((verdict.firsts[exact] != first).sum())
        tells = ~is_flat(originals(source_of(chunk))[1]) & ~is_flat(drawn_rows(chunk)[1][-some:])
        stays = tells & (verdict.kinds[near] < NEAR)
        has_first = verdict.kinds[first] == KEPT
        missed += int((stays & has_first).sum())
        chained += int((stays & ~has_first).sum())
        planted += some + int(tells.sum())
    return {"planted": planted, "missed": missed, "chained": chained}


def distinct_by_duckdb(folder: Path, rows: int, work: Path) -> float:
    """Seconds in which DuckDB counts repeated pairs, out of core: the baseline."""
    paths = [str(part_path(folder, unit)) for unit in range(rows // UNIT_ROWS)]
    settings: dict[str, Any] = {"memory_limit": "6GB", "threads": 2, "temp_directory": str(work)}
    begin = time.monotonic()
    with duckdb.connect(":memory:", config=settings) as connection:
        connection.from_parquet(paths).create_view("parts")
        connection.execute(
            "SELECT count(*) FROM (SELECT pair_digest FROM parts GROUP BY 1 HAVING count(*) > 1)"
        ).fetchall()
    return time.monotonic() - begin


@contextmanager
def _peak_size(folder: Path) -> Iterator[list[int]]:
    """The largest size of a folder's files, looked at each second."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            peak[0] = max(peak[0], _size(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        peak[0] = max(peak[0], _size(folder))


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            continue
    return size


def main() -> None:
    job, folder, rows, *others = sys.argv[1:]
    if job == "make":
        make(Path(folder), int(rows), int(others[0]), int(others[1]))
    elif job == "drop":
        print(json.dumps(drop(Path(folder), int(rows), Path(others[0]))))
    else:
        print(json.dumps(distinct_by_duckdb(Path(folder), int(rows), Path(others[0]))))


if __name__ == "__main__":
    main()
