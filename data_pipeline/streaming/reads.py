"""What a batch reads, and which batches read a record: from the order alone.

Batches are numbered from 0 on, with those that a run skips. A set may have another order, and a
record another place, from some epoch on: in a newer version of the set.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.streaming.order import LaneOrder
from data_pipeline.streaming.shares import Shares

Slot = tuple[int, int, int, int]
"""(data set, its epoch, block, record in the block)."""
OrderAt = Callable[[int], LaneOrder]
"""The order of a data set in an epoch."""
PlaceAt = Callable[[int], tuple[int, int] | None]
"""(block, record in the block) of a record in an epoch; None if the set does not have it then."""


class Reads(Protocol):
    """The reads of a run; OneSet and Mixture."""

    def number(self, epoch: int, step: int) -> int:
        """The number of the batch at a stream's position."""

    def slots(self, number: int) -> list[Slot]:
        """The records of a batch, in slot order."""

    def batches(self, which: int, place_at: PlaceAt, end: int) -> Iterator[int]:
        """The batches before number `end` that read a record of a data set, ascending."""


class OneSet:
    """The reads of one data set."""

    def __init__(self, order_at: OrderAt) -> None:
        self._order_at = order_at

    def number(self, epoch: int, step: int) -> int:
        return sum(self._order_at(before).steps(before) for before in range(epoch)) + step

    def slots(self, number: int) -> list[Slot]:
        epoch, step = epoch_of(self._order_at, number)
        order = self._order_at(epoch)
        places = order.places(epoch, step, range(order.lanes)).tolist()
        return [(0, epoch, block, record) for block, record in places]

    def batches(self, which: int, place_at: PlaceAt, end: int) -> Iterator[int]:
        for before, step, _ in _places(self._order_at, place_at, end):
            if before + step < end:
                yield before + step


class Mixture:
    """The reads of a mixture."""

    def __init__(self, shares: Shares, orders: Sequence[OrderAt]) -> None:
        """`orders`: of each set, with one record of each lane a step."""
        self._shares, self._orders = shares, orders

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

    def batches(self, which: int, place_at: PlaceAt, end: int) -> Iterator[int]:
        drawn = int(self._shares.drawn(end)[:, which].max())
        for before, step, lane in _places(self._orders[which], place_at, drawn):
            number = self._shares.step_of(which, lane, before + step)
            if number < end:
                yield number

    def _slot(self, which: int, lane: int, draw: int) -> Slot:
        epoch, step = epoch_of(self._orders[which], draw)
        block, record = self._step(which, epoch, step)[lane].tolist()
        return which, epoch, block, record

    @lru_cache(maxsize=64)  # noqa: B019 - lives as long as the command
    def _step(self, which: int, epoch: int, step: int) -> NDArray[np.int64]:
        """(block, record) of each lane at a step of a set."""
        order = self._orders[which](epoch)
        return order.places(epoch, step, range(order.lanes))


def epoch_of(order_at: OrderAt, number: int) -> tuple[int, int]:
    """(epoch, step in it) of a set's step counted over all epochs."""
    epoch = 0
    while number >= (steps := order_at(epoch).steps(epoch)):
        number, epoch = number - steps, epoch + 1
    return epoch, number


def _places(order_at: OrderAt, place_at: PlaceAt, end: int) -> Iterator[tuple[int, int, int]]:
    """(steps before the epoch, step in it, slot) of a record in each epoch that reads it, up to
    step `end` of the set."""
    before, epoch = 0, 0
    while before < end:
        order, place = order_at(epoch), place_at(epoch)
        step_slot = None if place is None else order.locate(epoch, *place)
        if step_slot is not None:
            yield before, *step_slot
        before += order.steps(epoch)
        epoch += 1
