"""Batches of raw pairs or token records, in the lane order, with exact positions.

    store -> blocks (one ranged GET each, crc checked) -> lane order -> batch of this rank

Every iterator yields `(batch, state)`; the state is the position BEHIND the batch, so that a run
saved with it reads the next batch first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from core.errors import ConfigError
from data_pipeline.config import OrderConfig
from data_pipeline.order import VERSION, LaneOrder

Record = TypeVar("Record", covariant=True)


class BlockSource(Protocol[Record]):
    """A data set as blocks of records."""

    fingerprint: str
    sizes: list[int]
    """Records of each block."""

    def read(self, block: int) -> list[Record]:
        """Fetch and check one block."""


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where a stream stands; any rank may write it, every world size may read it."""

    fingerprint: str
    seed: int
    batch: int
    lanes: int
    window: int
    block: int
    version: int
    epoch: int
    step: int
    """Steps of this epoch that are done."""
    passed: tuple[tuple[int, int], ...] = ()
    """(epoch, step) of batches that are passed over."""

    def passing(self, batches: Iterable[tuple[int, int]]) -> "StreamState":
        """The same position, with these batches passed over."""
        return replace(self, passed=tuple(batches))

    def problems(self, other: "StreamState") -> list[str]:
        """What keeps a run with this state from going on with the other's data."""
        fixed = ("fingerprint", "seed", "batch", "lanes", "window", "block", "version")
        return [
            f"the data's {name} was {getattr(other, name)}, now it is {getattr(self, name)}; "
            "give the same data and order settings, or start a new run folder"
            for name in fixed
            if getattr(self, name) != getattr(other, name)
        ]


class Stream(Generic[Record]):
    """The batches of one data-parallel rank."""

    def __init__(
        self,
        source: BlockSource[Record],
        *,
        seed: int,
        batch: int,
        order: OrderConfig,
        rank: int = 0,
        ranks: int = 1,
        reads: bool = True,
    ) -> None:
        """`batch` is the global batch size; this rank reads its lanes' share of it.

        Without `reads` the stream keeps its place and gives empty batches: the stages in the
        middle of a pipeline see no data.
        """
        problems = order.problems(batch, ranks)
        if problems:
            raise ConfigError.from_problems(problems)
        self._source, self._reads = source, reads
        self._order = LaneOrder(source.sizes, seed, batch, order)
        self._lanes = order.lanes // ranks
        self._first_lane = rank * self._lanes
        self._blocks: OrderedDict[int, list[Record]] = OrderedDict()
        self._keep = 2 * self._lanes * order.window
        self.state = StreamState(
            fingerprint=source.fingerprint,
            seed=seed,
            batch=batch,
            lanes=order.lanes,
            window=order.window,
            block=order.block,
            version=VERSION,
            epoch=0,
            step=0,
        )

    def resume(self, state: StreamState) -> None:
        """Go on behind the batch that this state belongs to.

        Raises: ConfigError if the data or the order differ.
        """
        problems = self.state.problems(state)
        if problems:
            raise ConfigError.from_problems(problems)
        self.state = replace(state, passed=tuple((e, s) for e, s in state.passed))

    def __iter__(self) -> Iterator[tuple[list[Record], StreamState]]:
        with ThreadPoolExecutor(1, "prefetch") as pool:
            position = self._settled(self.state)
            ahead = pool.submit(self._read, position)
            while True:
                current, position = (
                    position,
                    self._settled(replace(position, step=position.step + 1)),
                )
                batch = ahead.result()
                ahead = pool.submit(self._read, position)
                self.state = replace(current, step=current.step + 1)
                yield batch, self.state

    def _settled(self, state: StreamState) -> StreamState:
        while True:
            if state.step >= self._order.steps(state.epoch):
                state = replace(state, epoch=state.epoch + 1, step=0)
            elif (state.epoch, state.step) in state.passed:
                state = replace(state, step=state.step + 1)
            else:
                return state

    def _read(self, state: StreamState) -> list[Record]:
        if not self._reads:
            return []
        places = self._order.places(state.epoch, state.step, self._first_lane, self._lanes)
        return [self._block(place.block)[place.record] for place in places]

    def _block(self, number: int) -> list[Record]:
        if number not in self._blocks:
            self._blocks[number] = self._source.read(number)
            while len(self._blocks) > self._keep:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


def first_records(source: BlockSource[Any], count: int, rank: int = 0, ranks: int = 1) -> list[Any]:
    """This rank's part of the first `count` records, in stored order; for validation."""
    found: list[Any] = []
    for block in range(len(source.sizes)):
        if len(found) >= count:
            break
        found += source.read(block)
    return found[:count][rank::ranks]
