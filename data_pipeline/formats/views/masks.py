"""Which pairs of a raw data set are kept: a bit for each pair, the lowest bit of a byte first.

The bits count the pairs that the blocks hold, in the order of the blocks: 31 MB for 250M pairs. A
block is never cut again; its pairs whose bit is 0 are left out when it is read.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Kept = NDArray[np.bool_]


class MaskWriter:
    """Packs masks that come in parts of any length."""

    def __init__(self) -> None:
        self._packed = bytearray()
        self._rest: Kept = np.zeros(0, np.bool_)
        self.dropped = 0

    def add(self, kept: Kept) -> None:
        """Append the bits of the next pairs."""
        self.dropped += len(kept) - int(np.count_nonzero(kept))
        bits = np.concatenate([self._rest, kept])
        whole = len(bits) - len(bits) % 8
        self._packed += np.packbits(bits[:whole], bitorder="little").tobytes()
        self._rest = bits[whole:]

    def packed(self) -> NDArray[np.uint8]:
        """All bits so far; the last byte is filled up with zeros."""
        rest = np.packbits(self._rest, bitorder="little")
        return np.concatenate([np.frombuffer(self._packed, np.uint8), rest])


def bits_of(packed: NDArray[np.uint8], first: int, count: int) -> Kept:
    """`count` bits from the bit `first` on."""
    part = packed[first // 8 : (first + count + 7) // 8]
    bits: Kept = np.unpackbits(part, bitorder="little").view(np.bool_)
    return bits[first % 8 : first % 8 + count]


def narrowed(kept: Kept, chosen: Kept | None) -> Kept:
    """A mask of pairs, of whose kept ones only the chosen stay (one bit for each kept pair)."""
    if chosen is None:
        return kept
    result = kept.copy()
    result[np.flatnonzero(kept)] = chosen
    return result


def counts(kept: Kept, pairs: NDArray[Any]) -> NDArray[np.uint32]:
    """The number of kept pairs of each block; `pairs`: that of all its pairs."""
    ends = np.cumsum(pairs, dtype=np.int64)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept, dtype=np.int64)])
    kept_of: NDArray[np.uint32] = (sums[ends] - sums[ends - pairs]).astype(np.uint32)
    return kept_of


class Ranks:
    """The number of each kept record among the kept ones; 2 bytes a record of memory."""

    _TOGETHER = 256

    def __init__(self, kept: Kept) -> None:
        padded = np.zeros(-(-len(kept) // self._TOGETHER) * self._TOGETHER, np.bool_)
        padded[: len(kept)] = kept
        rows = padded.reshape(-1, self._TOGETHER)
        inside = np.cumsum(rows, axis=1, dtype=np.uint8)
        inside -= rows  # at most 255; a row of 256 ones wraps around, and back
        self.kept, self._inside = padded, inside.reshape(-1)
        sums = np.cumsum(np.count_nonzero(rows, axis=1), dtype=np.int64)
        self._before = np.concatenate([np.zeros(1, np.int64), sums])

    @property
    def total(self) -> int:
        """Number of kept records."""
        return int(self._before[-1])

    def of(self, records: NDArray[Any]) -> NDArray[np.int64]:
        """The new numbers of some kept records."""
        ranks: NDArray[np.int64] = self._before[records // self._TOGETHER] + self._inside[records]
        return ranks
