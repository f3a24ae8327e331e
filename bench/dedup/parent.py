"""Exact and near duplicates of a synthetic catalogue, with the keep-list and what is left out.

seconds     of `duplicates` at --near 3 on two threads, the keep-list (a bit a row) and the parquet
            file of what is left out; DuckDB's time for repeated pair digests alone stands beside
memory      highest resident set of that process
disk        the catalogue and the largest size of all temporary files
missed      planted duplicates that were not found, of all planted

The full size is 250 million rows (11 GB of parquet, kept in .cache; at most 30 GB of disk in all);
--rows gives another one. It is taken once: the spread is the figure itself.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.dedup.rows import chunk_rows
from bench.support.children import child_environment, module_command
from bench.support.rows import bench_row
from bench.support.sizes import cache, sized

SECONDS, MEMORY, DISK = 1200.0, 8e9, 60e9
"""Targets at 250 million rows."""
FULL = 250_000_000
_MAKERS = 2


def run(rows: int = 0) -> list[dict[str, Any]]:
    """Rows; ratio > 1 is better than the target; those of time and disk scale with the rows."""
    rows = (rows or sized(FULL, 40_000)) // chunk_rows() * chunk_rows()
    folder, work = cache("dedup") / "parts", cache("dedup") / "work"
    folder.mkdir(parents=True, exist_ok=True)
    environment = child_environment({**os.environ, "OMP_NUM_THREADS": "1"})
    makers = [
        subprocess.Popen(_command("make", folder, rows, i, _MAKERS), env=environment)
        for i in range(_MAKERS)
    ]
    if any([maker.wait() for maker in makers]):  # noqa: C419 - wait for each
        raise RuntimeError("the catalogue was not made")
    row = _measured("drop", folder, rows, work, environment)
    duckdb = _measured("duckdb", folder, rows, work, environment)
    print(json.dumps({**row, "duckdb": duckdb}), file=sys.stderr)
    part, seconds = rows / FULL, row["seconds"]["all"]
    of = f"{rows / 1e6:g} million rows"
    missed, planted = row["missed"], row["planted"]
    return [
        bench_row(f"seconds, {of}", seconds, "s", "target", [SECONDS * part / seconds]),
        bench_row(f"memory, {of}", row["memory"] / 1e6, "MB", "target", [MEMORY / row["memory"]]),
        bench_row(f"disk, {of}", row["disk"] / 1e9, "GB", "target", [DISK * part / row["disk"]]),
        bench_row(f"planted and missed, of {planted}", missed, "", "none", [float(not missed)]),
        bench_row(f"near too, {of}", seconds, "s", "DuckDB, exact alone", [duckdb / seconds]),
    ]


def _measured(job: str, folder: Path, rows: int, work: Path, environment: dict[str, str]) -> Any:
    """What a process prints; its temporary files are deleted."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        done = subprocess.run(
            _command(job, folder, rows, work),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _command(job: str, *values: object) -> list[str]:
    return module_command("bench.dedup.child", job, *map(str, values))
