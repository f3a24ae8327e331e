"""The row of a benchmark, as `python -m bench` prints it."""

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def bench_row(
    name: str,
    value: float,
    unit: str,
    baseline: str,
    ratios: Sequence[float],
    ratio: float | None = None,
) -> Row:
    """One figure beside its baseline; a ratio above 1 is better than the baseline.

    `ratios` are those of all rounds: the lowest and the highest are shown, and their median is
    the ratio unless it is given.
    """
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": statistics.median(ratios) if ratio is None else ratio,
        "spread": [min(ratios), max(ratios)],
    }
