"""The lane order: which record is read at which step, exactly once an epoch, for any rank count.

The blocks of an epoch are permuted and dealt to C lanes; inside a lane, each window of W blocks is
permuted record by record. Slot k of step s reads lane k // (G/C) at position s*(G/C) + k % (G/C).
Ranks own contiguous lanes, so a global batch is the same for every world size that divides C.
Records beyond the last whole step of the shortest lane are left out of that epoch (other ones each
epoch, because the blocks are dealt anew).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.keys import keyed_rng
from data_pipeline.config import OrderConfig

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """The address of a record."""

    block: int
    record: int


class LaneOrder:
    """The order of one data set under one seed; pure arithmetic, no state."""

    def __init__(self, sizes: list[int], seed: int, batch: int, config: OrderConfig) -> None:
        """`sizes` are the records of each block, `batch` is the global batch size."""
        self._sizes = np.asarray(sizes, np.int64)
        self._seed, self._config = seed, config
        self.batch, self.lanes = batch, config.lanes
        self.per_lane = batch // config.lanes
        if self.steps(0) < 1:
            raise ConfigError(
                f"{int(self._sizes.sum())} records in {len(sizes)} blocks fill no batch of {batch} "
                f"over {config.lanes} lanes; lower loop.batch, order.lanes or order.block"
            )

    def steps(self, epoch: int) -> int:
        """Whole steps of an epoch."""
        lengths = [int(self._sizes[blocks].sum()) for blocks in self._deal(epoch)]
        return min(lengths) // self.per_lane

    def places(self, epoch: int, step: int, first_lane: int, lanes: int) -> list[Place]:
        """The records of a run of lanes at one step, in slot order."""
        found = []
        for lane in range(first_lane, first_lane + lanes):
            start = step * self.per_lane
            found += [self._place(epoch, lane, start + i) for i in range(self.per_lane)]
        return found

    def _place(self, epoch: int, lane: int, position: int) -> Place:
        ends = self._window_ends(epoch, lane)
        window = int(np.searchsorted(ends, position, side="right"))
        inside = position - (int(ends[window - 1]) if window else 0)
        block, record = self._window(epoch, lane, window)[inside]
        return Place(block=int(block), record=int(record))

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its run
    def _deal(self, epoch: int) -> list[NDArray[Any]]:
        order = keyed_rng(self._seed, epoch, "order/blocks").permutation(len(self._sizes))
        return [order[lane :: self.lanes] for lane in range(self.lanes)]

    @lru_cache(maxsize=4096)  # noqa: B019
    def _window_ends(self, epoch: int, lane: int) -> NDArray[Any]:
        sizes = self._sizes[self._deal(epoch)[lane]]
        width = self._config.window
        return np.cumsum([sizes[i : i + width].sum() for i in range(0, len(sizes), width)])

    @lru_cache(maxsize=4096)  # noqa: B019
    def _window(self, epoch: int, lane: int, window: int) -> NDArray[Any]:
        width = self._config.window
        blocks = self._deal(epoch)[lane][window * width : (window + 1) * width]
        rows = [(block, i) for block in blocks for i in range(int(self._sizes[block]))]
        rng = keyed_rng(self._seed, epoch, f"{lane}:{window}", "order/window")
        return np.asarray(rows)[rng.permutation(len(rows))]
