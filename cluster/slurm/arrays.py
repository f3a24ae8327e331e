"""Arrays of workers, cut into parts of a size that Slurm admits."""

from dataclasses import dataclass

MAX_ARRAY_SIZE = 1001
"""Slurm's default of MaxArraySize: the numbers of an array's tasks are below it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive workers of an array; one sbatch job runs them."""

    first: int
    """Number of its first worker; task i of the job is worker first + i."""
    count: int
    digits: int
    """Digits of the largest task number; `first` is a multiple of 10 to their power."""

    @property
    def name(self) -> str:
        """Suffix of the script's name; empty for the first part."""
        return f"-{self.first}" if self.first else ""

    @property
    def log(self) -> str:
        """Slurm's pattern for the worker's number in a log's name, as decimal digits in a row."""
        if not self.first:
            return "%a"
        return f"{self.first // 10**self.digits}%{self.digits}a" if self.digits else str(self.first)


def parts_of(workers: int, limit: int) -> list[Part]:
    """The parts of an array of `workers`, where Slurm's MaxArraySize is `limit`.

    Their size is a power of ten, so that the names of logs keep the workers' numbers.
    """
    if workers <= limit:
        return [Part(first=0, count=workers, digits=len(str(workers - 1)))]
    digits = len(str(limit)) - 1
    size = 10**digits
    return [
        Part(first=first, count=min(size, workers - first), digits=digits)
        for first in range(0, workers, size)
    ]
