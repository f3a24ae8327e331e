"""Validated rows of metrics.jsonl; the file may contain anything."""

import json
import math
from collections.abc import Iterable
from typing import Any

from core.renamed import ROW, renamed, tell_old_keys

_DIGITS = 18
"""Maximum digits of an integer."""
_LARGEST = 1e100
"""Bound of figures, so that sums stay finite."""
_FIGURES = (
    "seconds",
    "tokens_per_second",
    "data_wait_fraction",
    "data_wait_seconds",
    "model_tflops",
    "peak_tflops",
    "concurrent_ranks",
    "mfu",
    "slowest_rank",
    "slowest_ratio",
    "memory_bytes",
    "memory_peak_bytes",
    "cuda_bytes",
    "cuda_peak_bytes",
    "compress_raw_bytes",
    "compress_sent_bytes",
)
"""Fields that must be numbers, because readers compute with them."""
_GO_TOGETHER = {
    "mfu": "model_tflops",
    "slowest_ratio": "slowest_rank",
    "compress_raw_bytes": "compress_sent_bytes",
}
_DEPTHS = {"time": 1, "comm_seconds": 2, "comm": 3}
"""Fields that are nested mappings of figures, and their depth."""


def row_of(line: str) -> dict[str, Any] | None:
    """Parse a line, with renamed fields under new names; None if it is invalid."""
    try:
        row = json.loads(line, parse_int=_whole)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    row = renamed(ROW, row)
    return row if _sound(row) else None


def rows_of(lines: Iterable[str], where: str = "") -> tuple[list[dict[str, Any]], int]:
    """The valid rows, and the number of invalid lines; logs old names once if `where` is given."""
    lines = list(lines)
    if where:
        tell_old_keys(where, "\n".join(lines), ROW)
    parsed = [row_of(line) for line in lines]
    rows = [row for row in parsed if row is not None]
    return rows, len(parsed) - len(rows)


def passed_over(count: int) -> str:
    """The message about invalid lines."""
    return f"{count} line{'s' if count > 1 else ''} of metrics.jsonl cannot be read: passed over"


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{len(text)} digits")
    return int(text)


def _sound(row: dict[str, Any]) -> bool:
    step = row.get("step")
    return (
        isinstance(step, int)
        and not isinstance(step, bool)
        and step >= 0
        and all(_figures(row[name], 0) for name in _FIGURES if name in row)
        and all(_figures(row[name], depth) for name, depth in _DEPTHS.items() if name in row)
        and all(other in row for name, other in _GO_TOGETHER.items() if name in row)
    )


def _figures(value: Any, depth: int) -> bool:
    """True for a finite number below _LARGEST, or mappings of them nested `depth` deep."""
    if depth:
        return isinstance(value, dict) and all(_figures(each, depth - 1) for each in value.values())
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and abs(value) < _LARGEST
    )
