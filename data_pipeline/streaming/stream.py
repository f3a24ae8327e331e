"""Batches of raw pairs or token records, in the lane order, with exact resume positions.

    store -> blocks (threads; a ranged GET and a checksum each) -> shuffled windows
          -> chunks of several steps (one thread, ahead of the trainer) -> batch of this rank

Every iterator yields `(batch, state)`; the state is the position AFTER the batch, so that a run
resumed from it reads the next batch. A rank holds one or two windows of each of its lanes.
A stream of a growing data set pauses after each epoch, when it may switch to a newer version.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.keys import KeyPart
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.streaming.order import VERSION, LaneOrder, Window
from data_pipeline.streaming.state import StreamState

_CHUNK = 32
"""Records of a lane that are gathered together."""
_KEPT_BUFFERS = 4
"""Free buffers that are kept for the next windows."""


class Records(Protocol):
    """A batch of records; TokenRecords and RawRecords."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: Any) -> Any: ...

    def drawn(self, *key: KeyPart) -> Any:
        """The records with one text each, sampled by key and id if the stored ones have several."""

    @staticmethod
    def gather(pieces: Sequence[tuple[Any, NDArray[Any], slice | NDArray[Any]]]) -> Any:
        """For each piece (records, places, rows), copy records[places] to rows of the result."""


class Buffer(Protocol):
    """Collects the blocks of a window from several threads; TokenBuffer and RawBuffer."""

    def put(self, block: int, records: Any) -> None:
        """Store the records of one block."""

    def records(self) -> Any:
        """All records, in block order."""


R = TypeVar("R", bound=Records, covariant=True)


class BlockSource(Protocol[R]):
    """A data set that is read in blocks of records."""

    fingerprint: str
    sizes: NDArray[Any]
    """Number of records of each block."""
    variants: int
    """Epoch e reads variant e % variants."""

    def read(self, block: int, variant: int = 0) -> R:
        """Fetch and check one block."""

    def buffer(self, sizes: NDArray[Any], free: Any = None) -> Buffer:
        """A buffer for blocks of these sizes, in the memory of `free` if it is large enough."""

    def empty(self) -> R:
        """No records."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive steps of an epoch that are gathered together."""

    epoch: int
    first: int
    """Its first step."""
    count: int
    ends_epoch: bool


def chunks_of(order: LaneOrder, epoch: int, step: int, most: int) -> Iterator[Chunk]:
    """Endless chunks from a position on, each of at most `most` steps of one epoch."""
    while True:
        left = order.steps(epoch) - step
        if left < 1:
            epoch, step = epoch + 1, 0
            continue
        count = min(most, left)
        yield Chunk(epoch=epoch, first=step, count=count, ends_epoch=count == left)
        step += count


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
        pauses: bool = False,
    ) -> None:
        """`batch` is the global batch size; this rank reads its lanes' share of it.

        Without `reads` the stream advances but yields empty batches: the middle stages of a
        pipeline need no data. If it `pauses`, an iteration ends with its epoch.
        """
        problems = order.problems(batch, ranks)
        if problems:
            raise ConfigError.from_problems(problems)
        self._reads, self._loader, self._pauses = reads, loader, pauses
        self._source, self._config = source, order
        self.order = LaneOrder(source.sizes, seed, batch, order)
        share = order.lanes // ranks
        self._lanes = range(rank * share, (rank + 1) * share)
        self.state = StreamState(
            fingerprint=source.fingerprint,
            seed=seed,
            batch=batch,
            lanes=order.lanes,
            window=order.shuffle_buffer,
            version=VERSION,
            epoch=0,
            step=0,
        )

    def resume(self, state: StreamState, source: BlockSource[Records] | None = None) -> None:
        """Continue after the batch of this state; `source`: another version of the data.

        Raises: ConfigError if the data or the order differ.
        """
        own = self.state if source is None else replace(self.state, fingerprint=source.fingerprint)
        problems = own.problems(state)
        if problems:
            raise ConfigError.from_problems(problems)
        if source is not None:
            self._read(source)
        passed = tuple((epoch, step) for epoch, step in state.passed)
        versions = tuple((epoch, name) for epoch, name in state.versions)
        self.state = replace(state, passed=passed, versions=versions)

    def next_epoch(self, source: BlockSource[Records] | None = None) -> None:
        """Go on from a pause to the next epoch; `source`: another version of the data."""
        if source is not None:
            self._read(source)
        self.state = self.state.in_version(self.state.epoch + 1, self._source.fingerprint)

    def _read(self, source: BlockSource[Records]) -> None:
        self._source = source
        state = self.state
        self.order = LaneOrder(source.sizes, state.seed, state.batch, self._config)

    def __iter__(self) -> Generator[tuple[Any, StreamState], None, None]:
        lanes = self._lanes if self._reads else range(0)
        fetchers = ThreadPoolExecutor(self._loader.readers, "fetch")
        joiner = ThreadPoolExecutor(1, "join")
        windows = Windows(self._source, self.order, lanes, fetchers)
        try:
            yield from self._batches(windows, joiner)
        finally:
            joiner.shutdown(wait=False, cancel_futures=True)
            fetchers.shutdown(wait=True, cancel_futures=True)
            joiner.shutdown()

    def _batches(
        self, windows: "Windows", joiner: ThreadPoolExecutor
    ) -> Iterator[tuple[Any, StreamState]]:
        waiting: deque[tuple[Chunk, Future[Any]]] = deque()
        state, ahead = self.state, 0
        most = max(1, min(_CHUNK // self.order.per_lane, self._loader.prefetch))
        chunks = chunks_of(self.order, state.epoch, state.step, most)
        if self._pauses:
            chunks = takewhile(lambda chunk: chunk.epoch == state.epoch, chunks)
        while True:
            while ahead < self._loader.prefetch or not waiting:
                chunk = next(chunks, None)
                if chunk is None:
                    break
                needed = windows.plan(chunk)
                waiting.append((chunk, joiner.submit(windows.join, chunk, needed)))
                ahead += chunk.count
            if not waiting:
                return
            chunk, future = waiting.popleft()
            ahead -= chunk.count
            records = future.result()
            size = len(records) // chunk.count
            for i in range(chunk.count):
                step = chunk.first + i
                if (chunk.epoch, step) not in state.passed:
                    self.state = replace(state, epoch=chunk.epoch, step=step + 1)
                    yield records[i * size : (i + 1) * size], self.state


class Windows:
    """Fetches and holds the windows that a rank's next steps need."""

    def __init__(
        self,
        source: BlockSource[Records],
        order: LaneOrder,
        lanes: range,
        fetchers: ThreadPoolExecutor,
    ) -> None:
        self._source, self._order, self._lanes, self._pool = source, order, lanes, fetchers
        self._newest: dict[int, Window] = {}
        """Newest planned window by lane; used by the planning thread only."""
        self._fetched: dict[tuple[int, int, int], list[Future[Any]]] = {}
        self._ready: dict[tuple[int, int, int], tuple[Any, NDArray[Any]]] = {}
        """Records and permutations of loaded windows; used by the joining thread only."""
        self._buffers: dict[tuple[int, int, int], Buffer] = {}
        self._free: list[Buffer] = []
        """Free buffers of finished windows, for reuse."""

    def plan(self, chunk: Chunk) -> list[Window]:
        """Start fetching all blocks of a chunk; returns its windows in lane order."""
        first = chunk.first * self._order.per_lane
        last = first + chunk.count * self._order.per_lane
        windows = []
        for lane in self._lanes:
            newest = self._newest.get(lane)
            if newest and newest.epoch == chunk.epoch and last <= newest.end:
                windows.append(newest)
                continue
            for window in self._order.windows(chunk.epoch, lane, first, last):
                if newest is None or window.key > newest.key:
                    self._fetched[window.key] = self._fetch(window)
                    self._newest[lane] = window
                windows.append(window)
        return windows

    def join(self, chunk: Chunk, windows: list[Window]) -> Any:
        """The records of a chunk, in step order."""
        if not windows:
            return self._source.empty()
        width = self._order.per_lane
        first = chunk.first * width
        last = first + chunk.count * width
        lane_rows = np.arange(chunk.count)[:, None] * (width * len(self._lanes)) + np.arange(width)
        pieces = []
        for window in windows:
            records, shuffled = self._loaded(window)
            begin, end = max(first, window.start), min(last, window.end)
            offset = (window.lane - self._lanes.start) * width
            rows: Any = slice(offset + begin - first, offset + end - first)
            if chunk.count > 1:
                rows = lane_rows.reshape(-1)[begin - first : end - first] + offset
            pieces.append((records, shuffled[begin - window.start : end - window.start], rows))
        gathered = type(pieces[0][0]).gather(pieces)
        for window in windows:
            if window.end <= last or chunk.ends_epoch:
                del self._ready[window.key]
                self._free.append(self._buffers.pop(window.key))
        del self._free[:-_KEPT_BUFFERS]
        return gathered

    def forget(self) -> None:
        """Drop windows that were planned and never joined."""
        self._fetched.clear()
        self._buffers.clear()

    def _fetch(self, window: Window) -> list[Future[Any]]:
        variant = window.epoch % self._source.variants
        free = self._free.pop() if self._free else None
        buffer = self._source.buffer(self._source.sizes[window.blocks], free)
        self._buffers[window.key] = buffer

        def fill(place: int, block: int) -> None:
            records = self._source.read(block, variant)
            buffer.put(place, records.drawn(self._order.seed, window.epoch))

        blocks = enumerate(window.blocks.tolist())
        return [self._pool.submit(fill, place, block) for place, block in blocks]

    def _loaded(self, window: Window) -> tuple[Any, NDArray[Any]]:
        """A window's records in block order, and their permutation."""
        if window.key not in self._ready:
            for future in self._fetched.pop(window.key):
                future.result()
            records = self._buffers[window.key].records()
            self._ready[window.key] = records, self._order.shuffle(window)
        return self._ready[window.key]


def first_records(source: BlockSource[Any], count: int) -> list[Any]:
    """The first `count` records in stored order; for validation."""
    return list(islice(stored_records(source), count))


def stored_records(source: BlockSource[Any]) -> Iterator[Any]:
    """All records in stored order; holds one block in memory."""
    for block in range(len(source.sizes)):
        yield from source.read(block)
