"""The report: a table on a terminal, plain lines elsewhere, one JSON object for programs."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.doctor.finding import STATUSES, Finding, worst
from core.config import to_json
from core.errors import EXIT_FAILED

_COLOURS = {"ok": "green", "warning": "yellow", "bad": "bold red"}
_SHOWN = 6
"""Ranks that are named in one line."""


def exit_code(rows: Sequence[Finding]) -> int:
    """0 if nothing is bad."""
    return EXIT_FAILED if worst(rows) == "bad" else 0


def as_json(rows: Sequence[Finding]) -> dict[str, Any]:
    """The output of --json: the worst status, row counts by status, and all rows."""
    counts: dict[str, Any] = {
        status: sum(row.status == status for row in rows) for status in STATUSES
    }
    return {"status": worst(rows), **counts, "rows": to_json(list(rows))}


def show(rows: Sequence[Finding]) -> None:
    """Print the rows, equal ones of several ranks merged, and a summary line."""
    lines = merged(rows)
    if sys.stdout.isatty():
        _table(lines)
    else:
        for row, where in lines:
            mend = f" -> {row.fix}" if row.status != "ok" else ""
            print(f"{row.status:<8}{row.check}: {row.observed} [{where}]{mend}")
    counts = as_json(rows)
    print(f"{counts['bad']} bad, {counts['warning']} warnings, {counts['ok']} ok")


def merged(rows: Sequence[Finding]) -> list[tuple[Finding, str]]:
    """Merge equal rows, each with all its places; bad ones come last, next to the prompt."""
    places: dict[tuple[str, ...], list[Finding]] = {}
    for row in rows:
        same = () if row.status == "ok" else (row.observed, row.fix)
        places.setdefault((row.status, row.check, *same), []).append(row)
    lines = [(each[0], _where(each)) for each in places.values()]
    return sorted(lines, key=lambda line: STATUSES.index(line[0].status))


def _where(rows: Sequence[Finding]) -> str:
    hosts = list(dict.fromkeys(row.host for row in rows))
    ranks = sorted({row.rank for row in rows if row.rank is not None})
    more = ", ..." if len(ranks) > _SHOWN else ""
    shown = ", ".join(map(str, ranks[:_SHOWN])) + more
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} nodes: {', '.join(hosts[:_SHOWN])}"
    return f"{where} rank {shown}" if ranks else where


def _table(lines: Sequence[tuple[Finding, str]]) -> None:
    table = Table("check", "status", "observed", "where", "how to mend")
    for row, where in lines:
        colour = _COLOURS[row.status]
        texts = (row.observed, where, row.fix if row.status != "ok" else "")
        table.add_row(row.check, Text(row.status, colour), *map(Text, texts))
    Console().print(table)
