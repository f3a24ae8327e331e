"""Statistics of token records that validations report; imports no torch."""

from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.shards import FIRST_BLOCKS
from data_pipeline.formats.tokens import TokenRecords

ENTROPY = "per_position_entropy"
_DIGITS = 9
"""Decimals: the last bits of a logarithm differ between CPUs, a manifest must not."""


def per_position_entropy(
    read: Callable[[int], Any], blocks: int, positions: int, vocabulary: int
) -> float:
    """Mean over positions of the entropy of the image codes there, in the first blocks.

    `read` gives a block's records.
    Units: nats per token; at most log(vocabulary).
    """
    counts = np.zeros(positions * vocabulary, np.int32)
    rows = np.arange(positions, dtype=np.int64) * vocabulary
    for records in fetched(read, range(min(blocks, FIRST_BLOCKS))):
        held = records if isinstance(records, TokenRecords) else TokenRecords.of(records)
        np.add.at(counts, (rows + held.image).reshape(-1), 1)
    total = 0.0
    for row in counts.reshape(positions, vocabulary):
        shares = row[row > 0] / max(int(row.sum()), 1)
        total -= float((shares * np.log(shares)).sum())
    return round(total / positions, _DIGITS)
