"""Comparisons of runs."""

from typing import Any


def largest_difference(a: list[dict[str, Any]], b: list[dict[str, Any]], field: str) -> float:
    """Largest relative difference of a figure over all steps."""
    assert [row["step"] for row in a] == [row["step"] for row in b]
    return max(abs(x[field] - y[field]) / abs(x[field]) for x, y in zip(a, b, strict=True))
