"""Sizes of a benchmark, in full or in miniature: `python -m bench NAME --tiny`.

A miniature shows in seconds that a benchmark still runs; its figures mean nothing.
"""

import os
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
TINY = "TAPIR_BENCH_TINY"
"""Variable that says so to the processes that a benchmark starts, too."""


def tiny() -> bool:
    """Say whether this is a miniature."""
    return bool(os.environ.get(TINY))


def sized(full: T, small: T) -> T:
    """The full size, or that of the miniature."""
    return small if tiny() else full


def cache(name: str) -> Path:
    """The folder, in the current one, in which a benchmark keeps what takes long to make."""
    return Path(".cache", f"bench-{name}{'-tiny' if tiny() else ''}")
