"""Rows on a disk, partitioned by a hash: rows with equal keys are in one partition, in order.

A pass over the set writes partitions, and each partition is then handled in memory: memory is that
of a partition, at any number of rows.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
PARTITION_ROWS = 2**21
"""Rows of a partition, on average."""
_MOST_BITS = 10
"""Of the number of partitions; each is a file, open only while rows are appended."""
_TOGETHER = 2**20
"""Rows that are partitioned together."""
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio."""


class Partitions:
    """Files of rows of one type; a context manager that deletes them at its end."""

    def __init__(self, folder: Path, name: str, kind: np.dtype[Any], rows: int) -> None:
        """`rows`: about how many will be added."""
        self._bits = min(_MOST_BITS, max(0, (rows // PARTITION_ROWS).bit_length()))
        self._paths = [folder / f"{name}-{number:04d}" for number in range(2**self._bits)]
        self._kind = kind
        self._pending: list[tuple[Words, NDArray[Any]]] = []
        self._waiting = 0

    def __enter__(self) -> "Partitions":
        for path in self._paths:
            path.write_bytes(b"")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._paths)

    def add(self, keys: Words, rows: NDArray[Any]) -> None:
        """Append rows; equal keys go to the same partition.

        Raises: OSError if the disk is full.
        """
        self._pending.append((keys, rows))
        self._waiting += len(rows)
        if self._waiting >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows."""
        if not self._pending:
            return
        keys = np.concatenate([keys for keys, _ in self._pending])
        rows = np.concatenate([rows for _, rows in self._pending])
        self._pending, self._waiting = [], 0
        numbers = self._numbers(keys)
        order = np.argsort(numbers, kind="stable")
        ends = np.cumsum(np.bincount(numbers, minlength=len(self))).tolist()
        rows = rows[order]
        for path, begin, end in zip(self._paths, [0, *ends], ends, strict=False):
            if end > begin:
                with open(path, "ab") as file:
                    file.write(rows[begin:end].tobytes())

    def part(self, number: int) -> NDArray[Any]:
        """The rows of one partition, once all are added and flushed."""
        return np.fromfile(self._paths[number], self._kind)

    def replace(self, number: int, rows: NDArray[Any]) -> None:
        """Write other rows to a partition, once all are added."""
        rows.tofile(self._paths[number])

    def _numbers(self, keys: Words) -> NDArray[np.uint16]:
        if not self._bits:
            return np.zeros(len(keys), np.uint16)
        mixed: Words = (keys ^ (keys >> np.uint64(32))) * _ODD
        return (mixed >> np.uint64(64 - self._bits)).astype(np.uint16)
