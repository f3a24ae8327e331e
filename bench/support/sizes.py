"""Sizes of a benchmark, in full or in miniature: `python -m bench NAME --tiny`.

A miniature shows in seconds that a benchmark still runs; its figures mean nothing.
"""

import os
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
TINY = "TAPIR_BENCH_TINY"
"""Environment variable that tells child processes to run in miniature."""


def tiny() -> bool:
    """Say whether this is a miniature."""
    return bool(os.environ.get(TINY))


def sized(full: T, small: T) -> T:
    """The full size, or the miniature's."""
    return small if tiny() else full


def cache(name: str) -> Path:
    """Folder in the current one for files that are slow to make."""
    return Path(".cache", f"bench-{name}{'-tiny' if tiny() else ''}")
