"""Statistics of token records that validations report; imports no torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.tokens import TokenRecords

ENTROPY = "per_position_entropy"
FIRST_BLOCKS = 2000
"""Blocks of the train split whose codes are counted."""
_THREADS = 4
_TOGETHER = 2048
"""Records whose codes are counted together."""
_DIGITS = 9
"""Decimals: the last bits of a logarithm differ between CPUs, a manifest must not."""


def per_position_entropy(
    read: Callable[[int], Any], blocks: int, positions: int, vocabulary: int
) -> float:
    """Mean over positions of the entropy of the image codes there, in the first blocks.

    `read` gives a block's records.
    Units: nats per token; at most log(vocabulary).
    """
    counts = np.zeros((positions, vocabulary), np.int32)
    waiting: list[NDArray[np.uint16]] = []
    for records in fetched(read, range(min(blocks, FIRST_BLOCKS)), _THREADS):
        held = records if isinstance(records, TokenRecords) else TokenRecords.of(records)
        waiting.append(held.image)
        if sum(map(len, waiting)) >= _TOGETHER:
            _count(waiting, counts)
            waiting = []
    _count(waiting, counts)
    total = 0.0
    for row in counts:
        shares = row[row > 0] / max(int(row.sum()), 1)
        total -= float((shares * np.log(shares)).sum())
    return round(total / positions, _DIGITS)


def _count(images: list[NDArray[np.uint16]], counts: NDArray[np.int32]) -> None:
    """Add the codes of each position to its row of the counts."""
    if images:
        for row, codes in zip(counts, np.ascontiguousarray(np.concatenate(images).T), strict=True):
            row += np.bincount(codes, minlength=len(row)).astype(np.int32)
