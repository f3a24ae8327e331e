"""Checks that compare ranks: their clocks, and whether they share the run folder."""

import json
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.doctor.finding import STATUSES, Finding, bad, clock_finding, ok, placed
from cluster.doctor.folders import PROBE, RUN_FOLDER, existing
from cluster.doctor.meeting import Gather

ROUNDS = 5
"""Times are taken when all ranks leave a gather; the median of the rounds is used."""
_SEEN_SECONDS = 2.0
"""A new file may take this long to appear on a network file system."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a rank sends to rank 0."""

    rank: int
    host: str
    seen: str | None
    """Content that it read in rank 0's file; empty if it saw none, None if it did not check."""
    times: list[float]
    rows: list[Finding]


def compare(rank: int, rows: list[Finding], out: Path, gather: Gather) -> list[Finding]:
    """On rank 0 all ranks' rows plus those of the comparison; on other ranks their own rows."""
    broken = any(row.check == RUN_FOLDER and row.status == "bad" for row in rows)
    with _written(Path() if broken else existing(out), rank, broken) as (path, token):
        path = Path(gather(str(path))[0])
        seen = None if broken else _read(path)
        times = []
        for _ in range(ROUNDS):
            gather("")
            times.append(time.time())
        host = rows[0].host if rows else ""
        mine = Told(rank=rank, host=host, seen=seen, times=times, rows=rows)
        texts = gather(json.dumps(asdict(mine)))
    if rank:
        return rows
    told = [_told(text) for text in texts if text]
    all_rows = [row for each in told for row in each.rows]
    return placed([*all_rows, *clock_rows(told), *folder_rows(told, token, path)], 0)


def clock_rows(told: list[Told]) -> list[Finding]:
    """Rows for clocks that are off: from rank 0's with two nodes, from the median with more."""
    if len(told) < 2:
        return []
    rounds = range(ROUNDS)
    right = [
        told[0].times[i] if len(told) == 2 else statistics.median(each.times[i] for each in told)
        for i in rounds
    ]
    offsets = [statistics.median(each.times[i] - right[i] for i in rounds) for each in told]
    whose = "rank 0's" if len(told) == 2 else "the median of all ranks"
    rows = [
        replace(clock_finding(offset, whose), host=each.host, rank=each.rank)
        for each, offset in zip(told, offsets, strict=True)
    ]
    wrong = [row for row in rows if row.status != STATUSES[0]]
    apart = max(offsets) - min(offsets)
    return wrong or [ok("clock", f"the clocks of {len(told)} ranks are {apart:.3f} s apart")]


def folder_rows(told: list[Told], token: str, path: Path) -> list[Finding]:
    """Rows for ranks that do not see what rank 0 wrote into the run folder."""
    if not token:
        return []  # rank 0 cannot use it: another row reports that
    fix = "mount the same file system at that path on all nodes, or give another --out"
    blind = [
        replace(
            bad("shared run folder", f"{path.parent} is not the one that rank 0 sees", fix),
            host=each.host,
            rank=each.rank,
        )
        for each in told
        if each.seen not in (token, None)
    ]
    return blind or [ok("shared run folder", f"{len(told)} ranks see the same {path.parent}")]


@contextmanager
def _written(folder: Path, rank: int, broken: bool) -> Iterator[tuple[Path, str]]:
    """Rank 0's probe file and its content; empty if it could not be written."""
    path, token = folder / f"{PROBE}{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
    if rank or broken:  # a broken folder is reported already, and must not stop the comparison
        yield path, ""
        return
    try:
        path.write_text(token)
    except OSError:
        token = ""
    try:
        yield path, token
    finally:
        if token:
            path.unlink(missing_ok=True)


def _read(path: Path) -> str:
    until = time.monotonic() + _SEEN_SECONDS
    while True:
        try:
            return path.read_text()
        except OSError:
            if time.monotonic() > until or not path.parent.exists():
                return ""
            time.sleep(0.1)


def _told(text: str) -> Told:
    body = json.loads(text)
    return Told(**{**body, "rows": [Finding(**row) for row in body["rows"]]})
