"""Batches of raw pairs or token records, in the lane order, with exact positions.

    store -> blocks (threads; a ranged GET and a digest each) -> windows, shuffled
          -> chunks of some steps (one thread, ahead of the trainer) -> batch of this rank

Every iterator yields `(batch, state)`; the state is the position BEHIND the batch, so that a run
saved with it reads the next batch first. A rank keeps one or two windows of each of its lanes.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.order import VERSION, LaneOrder, Window

_CHUNK = 32
"""Records of a lane that are put together at once."""


class Records(Protocol):
    """Some records; TokenRecords and RawRecords."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: Any) -> Any: ...

    def take(self, places: Any) -> Any:
        """The records at some places, in that order."""

    @staticmethod
    def join(parts: Sequence[Any]) -> Any:
        """Records in a row."""


R = TypeVar("R", bound=Records, covariant=True)


class BlockSource(Protocol[R]):
    """A data set as blocks of records."""

    fingerprint: str
    sizes: NDArray[Any]
    """Records of each block."""
    variants: int
    """Epoch e reads variant e % variants."""

    def read(self, block: int, variant: int = 0) -> R:
        """Fetch and check one block."""

    def empty(self) -> R:
        """No records."""


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where a stream stands; any rank may write it, every world size may read it."""

    fingerprint: str
    seed: int
    batch: int
    lanes: int
    window: int
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
        fixed = ("fingerprint", "seed", "batch", "lanes", "window", "version")
        return [
            f"the data's {name} was {getattr(other, name)}, now it is {getattr(self, name)}; "
            "give the same data and order settings, or start a new run folder"
            for name in fixed
            if getattr(self, name) != getattr(other, name)
        ]


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Neighbouring steps of an epoch that are put together at once."""

    state: StreamState
    """The position before it."""
    count: int
    ends_epoch: bool


class Stream:
    """The batches of one data-parallel rank."""

    def __init__(
        self,
        source: BlockSource[Records],
        *,
        seed: int,
        batch: int,
        order: OrderConfig,
        loader: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
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
        self._source, self._reads, self._loader = source, reads, loader
        self.order = LaneOrder(source.sizes, seed, batch, order)
        share = order.lanes // ranks
        self._lanes = range(rank * share, (rank + 1) * share)
        self.state = StreamState(
            fingerprint=source.fingerprint,
            seed=seed,
            batch=batch,
            lanes=order.lanes,
            window=order.window,
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

    def __iter__(self) -> Iterator[tuple[Any, StreamState]]:
        lanes = self._lanes if self._reads else range(0)
        fetchers = ThreadPoolExecutor(self._loader.readers, "fetch")
        joiner = ThreadPoolExecutor(1, "join")
        windows = _Windows(self._source, self.order, lanes, fetchers)
        try:
            yield from self._batches(windows, joiner)
        finally:
            joiner.shutdown(wait=False, cancel_futures=True)
            fetchers.shutdown(wait=True, cancel_futures=True)
            joiner.shutdown()

    def _batches(
        self, windows: "_Windows", joiner: ThreadPoolExecutor
    ) -> Iterator[tuple[Any, StreamState]]:
        waiting: deque[tuple[_Chunk, Future[Any]]] = deque()
        chunks = self._chunks()
        ahead = 0
        while True:
            while ahead < self._loader.ahead or not waiting:
                chunk = next(chunks)
                wanted = windows.plan(chunk)
                waiting.append((chunk, joiner.submit(windows.join, chunk, wanted)))
                ahead += chunk.count
            chunk, future = waiting.popleft()
            ahead -= chunk.count
            records = future.result()
            size = len(records) // chunk.count
            for i in range(chunk.count):
                state = replace(chunk.state, step=chunk.state.step + i + 1)
                if (state.epoch, state.step - 1) not in state.passed:
                    self.state = state
                    yield records[i * size : (i + 1) * size], state

    def _chunks(self) -> Iterator[_Chunk]:
        state, most = self.state, max(1, min(_CHUNK // self.order.per_lane, self._loader.ahead))
        while True:
            left = self.order.steps(state.epoch) - state.step
            if left < 1:
                state = replace(state, epoch=state.epoch + 1, step=0)
                continue
            count = min(most, left)
            yield _Chunk(state=state, count=count, ends_epoch=count == left)
            state = replace(state, step=state.step + count)


class _Windows:
    """The windows that a rank's next steps need."""

    def __init__(
        self,
        source: BlockSource[Records],
        order: LaneOrder,
        lanes: range,
        fetchers: ThreadPoolExecutor,
    ) -> None:
        self._source, self._order, self._lanes, self._pool = source, order, lanes, fetchers
        self._newest: dict[int, Window] = {}
        """By lane; known to the planning thread alone."""
        self._fetched: dict[tuple[int, int, int], list[Future[Any]]] = {}
        self._ready: dict[tuple[int, int, int], Any] = {}
        """Shuffled windows; known to the joining thread alone."""

    def plan(self, chunk: _Chunk) -> list[Window]:
        """Have all blocks of a chunk fetched; its windows, lane by lane."""
        first = chunk.state.step * self._order.per_lane
        last = first + chunk.count * self._order.per_lane
        found = []
        for lane in self._lanes:
            newest = self._newest.get(lane)
            if newest and newest.epoch == chunk.state.epoch and last <= newest.end:
                found.append(newest)
                continue
            for window in self._order.windows(chunk.state.epoch, lane, first, last):
                if newest is None or window.key > newest.key:
                    self._fetched[window.key] = self._fetch(window)
                    self._newest[lane] = window
                found.append(window)
        return found

    def join(self, chunk: _Chunk, windows: list[Window]) -> Any:
        """The records of a chunk, step by step."""
        if not windows:
            return self._source.empty()
        width = self._order.per_lane
        first = chunk.state.step * width
        last = first + chunk.count * width
        parts = []
        for window in windows:
            records = self._shuffled(window)
            parts.append(records[max(first - window.start, 0) : last - window.start])
            if window.end <= last or chunk.ends_epoch:
                del self._ready[window.key]
        records = type(parts[0]).join(parts)
        if chunk.count == 1:
            return records
        lanes = len(self._lanes)
        by_lane = np.arange(len(records)).reshape(lanes, chunk.count, width)
        return records.take(by_lane.transpose(1, 0, 2).reshape(-1))

    def _fetch(self, window: Window) -> list[Future[Any]]:
        variant = window.epoch % self._source.variants
        read = self._source.read
        return [self._pool.submit(read, int(block), variant) for block in window.blocks]

    def _shuffled(self, window: Window) -> Any:
        if window.key not in self._ready:
            parts = [future.result() for future in self._fetched.pop(window.key)]
            joined = type(parts[0]).join(parts)
            self._ready[window.key] = joined.take(self._order.shuffle(window))
        return self._ready[window.key]


def first_records(source: BlockSource[Any], count: int) -> list[Any]:
    """The first `count` records in stored order; for validation."""
    found: list[Any] = []
    for block in range(len(source.sizes)):
        if len(found) >= count:
            break
        found += list(source.read(block))
    return found[:count]
