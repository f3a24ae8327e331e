"""Rows of the report, and a runner of checks that hang or fail without breaking the others."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from core.log import HideSecrets

Status = Literal["ok", "warning", "bad"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "bad")
GB = 1e9
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check in one place."""

    check: str
    status: Status
    observed: str
    fix: str = ""
    """How to fix it; empty if there is nothing to fix."""
    host: str = ""
    rank: int | None = None


Check = Callable[[], list[Finding]]


def ok(check: str, text: str) -> Finding:
    """A row without a problem."""
    return Finding(check=check, status="ok", observed=text)


def warning(check: str, text: str, fix: str) -> Finding:
    """A row for a possible problem."""
    return Finding(check=check, status="warning", observed=text, fix=fix)


def bad(check: str, text: str, fix: str) -> Finding:
    """A row for a problem that makes runs fail."""
    return Finding(check=check, status="bad", observed=text, fix=fix)


def worst(rows: Iterable[Finding]) -> Status:
    """The worst status of some rows."""
    return max((row.status for row in rows), key=STATUSES.index, default="ok")


def placed(rows: Iterable[Finding], rank: int | None) -> list[Finding]:
    """Fill in host and rank where missing, and hide secrets."""
    return [
        replace(
            row,
            observed=_hidden(row.observed),
            host=row.host or here(),
            rank=rank if row.rank is None else row.rank,
        )
        for row in rows
    ]


def here() -> str:
    """This machine's name, as its scheduler knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def run_checks(checks: Mapping[str, Check], limit: float) -> list[Finding]:
    """Run checks in parallel; a check that hangs (a dead file server) or fails becomes a row."""
    done: dict[str, list[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            done[name] = check()
        except Exception as error:
            text = f"the check failed: {type(error).__name__}: {error}"
            done[name] = [bad(name, text, "mend what the error names")]

    threads = {
        name: threading.Thread(target=run, args=(name, check), daemon=True)
        for name, check in checks.items()
    }
    for thread in threads.values():
        thread.start()
    until = time.monotonic() + limit
    for thread in threads.values():
        thread.join(max(0.0, until - time.monotonic()))
    rows = []
    for name in checks:
        silent = f"no answer within {limit:g} s"
        fix = "look for a file server, name server or network that hangs on this machine"
        rows += done.get(name) or [bad(name, silent, fix)]
    return rows


def _hidden(text: str) -> str:
    """A text without the credentials of this environment."""
    record = logging.makeLogRecord({"msg": text.replace("%", "%%"), "args": ()})
    HideSecrets().filter(record)
    return str(record.msg).replace("%%", "%")


NOTED = 2.0
"""Seconds; with a time server, clocks are off by milliseconds."""


WRONG = 30.0
"""Seconds. Munge refuses 300, S3 refuses 900."""


_FIX = "set the clock of that node: chronyc makestep, or systemctl restart chronyd"


def clock_finding(offset: float, whose: str) -> Finding:
    """A row for a clock that is `offset` seconds ahead of the reference `whose`."""
    direction = "ahead of" if offset > 0 else "behind"
    text = f"the clock is {abs(offset):.1f} s {direction} {whose}"
    if abs(offset) > WRONG:
        return bad("clock", text, _FIX)
    if abs(offset) > NOTED:
        return warning("clock", text, _FIX)
    return ok("clock", text)
