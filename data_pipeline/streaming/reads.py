"""What a batch reads, and which batches read a record: from the order alone.

Batches are numbered from 0 on, with those that a run skips.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import OrderConfig
from data_pipeline.streaming.mixed_source import MixedSource
from data_pipeline.streaming.mixture import set_seed
from data_pipeline.streaming.order import LaneOrder
from data_pipeline.streaming.shares import Shares

Slot = tuple[int, int, int, int]
"""(data set, its epoch, block, record in the block)."""


class Reads(Protocol):
    """The reads of a run; OneSet and Mixture."""

    def number(self, epoch: int, step: int) -> int:
        """The number of the batch at a stream's position."""

    def slots(self, number: int) -> list[Slot]:
        """The records of a batch, in slot order."""

    def batches(self, which: int, block: int, record: int, end: int) -> Iterator[int]:
        """The batches before number `end` that read a record of a data set, ascending."""


class OneSet:
    """The reads of one data set."""

    def __init__(self, source: Any, seed: int, batch: int, order: OrderConfig) -> None:
        self._order = LaneOrder(source.sizes, seed, batch, order)

    def number(self, epoch: int, step: int) -> int:
        return sum(map(self._order.steps, range(epoch))) + step

    def slots(self, number: int) -> list[Slot]:
        epoch, step = epoch_of(self._order.steps, number)
        places = self._order.places(epoch, step, range(self._order.lanes))
        return [(0, epoch, block, record) for block, record in places.tolist()]

    def batches(self, which: int, block: int, record: int, end: int) -> Iterator[int]:
        before, epoch = 0, 0
        while before < end:
            place = self._order.locate(epoch, block, record)
            if place is not None and before + place[0] < end:
                yield before + place[0]
            before += self._order.steps(epoch)
            epoch += 1


class Mixture:
    """The reads of a mixture."""

    def __init__(self, source: MixedSource, seed: int, batch: int, order: OrderConfig) -> None:
        self._shares = Shares([part.share for part in source.parts], seed, batch, order.lanes)
        self._orders = [
            LaneOrder(part.source.sizes, set_seed(seed, which), order.lanes, order)
            for which, part in enumerate(source.parts)
        ]

    def number(self, epoch: int, step: int) -> int:
        return step

    def slots(self, number: int) -> list[Slot]:
        drawn, counts = self._shares.drawn(number), self._shares.counts(number)
        return [
            self._slot(which, lane, first + i)
            for lane, (firsts, row) in enumerate(zip(drawn.tolist(), counts.tolist(), strict=True))
            for which, (first, count) in enumerate(zip(firsts, row, strict=True))
            for i in range(count)
        ]

    def batches(self, which: int, block: int, record: int, end: int) -> Iterator[int]:
        order, before, epoch = self._orders[which], 0, 0
        drawn = int(self._shares.drawn(end)[:, which].max())
        while before < drawn:
            place = order.locate(epoch, block, record)
            if place is not None:
                step, lane = place  # a lane has one record of each step of its set
                number = self._shares.step_of(which, lane, before + step)
                if number < end:
                    yield number
            before += order.steps(epoch)
            epoch += 1

    def _slot(self, which: int, lane: int, draw: int) -> Slot:
        epoch, step = epoch_of(self._orders[which].steps, draw)
        block, record = self._places(which, epoch, step)[lane].tolist()
        return which, epoch, block, record

    @lru_cache(maxsize=64)  # noqa: B019 - lives as long as the command
    def _places(self, which: int, epoch: int, step: int) -> NDArray[np.int64]:
        order = self._orders[which]
        return order.places(epoch, step, range(order.lanes))


def epoch_of(steps: Callable[[int], int], number: int) -> tuple[int, int]:
    """(epoch, step in it) of a step counted over all epochs."""
    epoch = 0
    while number >= (each := steps(epoch)):
        number, epoch = number - each, epoch + 1
    return epoch, number


def reads_of(source: Any, seed: int, batch: int, order: OrderConfig) -> Reads:
    """The reads of a data set or a mixture."""
    kind: Any = Mixture if isinstance(source, MixedSource) else OneSet
    reads: Reads = kind(source, seed, batch, order)
    return reads
