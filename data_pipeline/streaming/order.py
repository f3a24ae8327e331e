"""The lane order: the record of each step, exactly once per epoch, for any number of ranks.

The blocks of an epoch are permuted and dealt to C lanes; inside a lane, each window of W blocks is
permuted record by record. Slot k of step s reads lane k // (G/C) at position s*(G/C) + k % (G/C).
Ranks own contiguous lanes, so a global batch is the same for every world size that divides C.
The first window of lane l has 1 + l % W blocks only, so that lanes open their windows at different
steps and requests to the store are spread evenly. Records beyond the last whole step of the
shortest lane are left out of that epoch; each epoch deals the blocks again and leaves out others.

The order is arithmetic on the block sizes: any position is computed without reading earlier data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.keys import keyed_rng
from data_pipeline.config import OrderConfig

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Window:
    """Consecutive blocks of a lane whose records are shuffled together."""

    epoch: int
    lane: int
    number: int
    start: int
    """Position of its first record in the lane."""
    end: int
    """Position after its last record."""
    blocks: NDArray[np.int32]

    @property
    def key(self) -> tuple[int, int, int]:
        """Identifies the window in an order."""
        return self.epoch, self.lane, self.number


class LaneOrder:
    """The order of a data set under a seed; stateless apart from a memo."""

    def __init__(self, sizes: NDArray[Any], seed: int, batch: int, config: OrderConfig) -> None:
        """`sizes` are the record counts of the blocks, `batch` is the global batch size."""
        kind = np.int32 if int(np.sum(sizes)) < 2**31 else np.int64
        self._sizes: NDArray[Any] = np.asarray(sizes, kind)
        self.seed, self._config = seed, config
        self.batch, self.lanes = batch, config.lanes
        self.per_lane = batch // config.lanes
        if self.steps(0) < 1:
            raise ConfigError(
                f"{int(self._sizes.sum())} records in {len(sizes)} blocks fill no batch of {batch} "
                f"over {config.lanes} lanes; lower loop.global_batch_size or order.lanes, or make "
                "smaller blocks (--block of pack and tokenize)"
            )

    def steps(self, epoch: int) -> int:
        """Whole steps of an epoch."""
        _, ends = self._deal(epoch)
        return int(ends[:, -1].min()) // self.per_lane

    def windows(self, epoch: int, lane: int, first: int, last: int) -> Iterator[Window]:
        """The windows of a lane that hold its positions first ... last - 1."""
        dealt, ends = self._deal(epoch)
        width, short = self._config.shuffle_buffer, 1 + lane % self._config.shuffle_buffer
        row = ends[lane]
        while first < last:
            block = int(np.searchsorted(row, first, "right"))
            number = 0 if block < short else 1 + (block - short) // width
            begin = short + (number - 1) * width if number else 0
            stop = min(begin + width if number else short, dealt.shape[1])
            blocks = dealt[lane, begin:stop]
            yield Window(
                epoch=epoch,
                lane=lane,
                number=number,
                start=int(row[begin - 1]) if begin else 0,
                end=int(row[stop - 1]),
                blocks=blocks[blocks >= 0],
            )
            first = int(row[stop - 1])

    def shuffle(self, window: Window) -> NDArray[Any]:
        """The permutation of a window's records, numbered in block order."""
        name = f"{window.lane}:{window.number}"
        rng = keyed_rng(self.seed, window.epoch, name, "order/window")
        return rng.permutation(window.end - window.start)

    def places(self, epoch: int, step: int, lanes: range) -> NDArray[np.int64]:
        """The records of consecutive lanes at one step, in slot order.

        Shapes: returns (len(lanes) * batch / C, 2): block, and record in the block.
        """
        first, parts = step * self.per_lane, []
        last = first + self.per_lane
        for lane in lanes:
            for window in self.windows(epoch, lane, first, last):
                inside = slice(max(first, window.start) - window.start, last - window.start)
                parts.append(self._members(window)[self.shuffle(window)[inside]])
        return np.concatenate(parts)

    def locate(self, epoch: int, block: int, record: int) -> tuple[int, int] | None:
        """The step and slot at which a record is read; None if the epoch leaves it out."""
        dealt, ends = self._deal(epoch)
        lane, column = (int(place[0]) for place in np.nonzero(dealt == block))
        first = int(ends[lane, column - 1]) if column else 0
        (window,) = self.windows(epoch, lane, first, first + 1)
        inside = first - window.start + record
        place = window.start + int(np.flatnonzero(self.shuffle(window) == inside)[0])
        step, rest = divmod(place, self.per_lane)
        return (step, lane * self.per_lane + rest) if step < self.steps(epoch) else None

    def _members(self, window: Window) -> NDArray[np.int64]:
        """(block, record) of all records of a window, in block order."""
        sizes = self._sizes[window.blocks]
        starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
        blocks: NDArray[Any] = np.repeat(window.blocks, sizes)
        return np.stack([blocks, np.arange(len(starts)) - starts], 1)

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its run
    def _deal(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """Blocks of each lane, padded with -1, and the cumulative record counts."""
        count = len(self._sizes)
        dealt = np.full(-(-count // self.lanes) * self.lanes, -1, np.int32)
        dealt[:count] = keyed_rng(self.seed, epoch, "order/blocks").permutation(count)
        dealt = np.ascontiguousarray(dealt.reshape(-1, self.lanes).T)
        ends = np.append(self._sizes, self._sizes.dtype.type(0))[dealt]
        return dealt, np.cumsum(ends, axis=1, out=ends)
