"""Batches of several data sets, each with its exact share, its own order and its own epochs.

    set 0's Stream, one record a lane and step  --\
    set 1's Stream                              ----> lanes, by shares.py -> batch of this rank
    set 2's Stream                              --/

Ranks own the same lanes of every set, so a global batch is the same for every world size that
divides the lanes, and each block is read by one rank. A set's stream is ahead of its slowest lane
by the few records in which its lanes differ; a position is that of the slowest lane, and a resumed
run reads those records again.
"""

from collections import deque
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.keys import key_int
from core.storage.mixture import share_text
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.streaming.mixed_source import MixedSource, parts_of
from data_pipeline.streaming.shares import VERSION, Shares
from data_pipeline.streaming.state import MixtureState, Position, StreamState
from data_pipeline.streaming.stream import Stream

_Counts = NDArray[np.int64]


class MixtureStream:
    """The batches of one data-parallel rank."""

    def __init__(
        self,
        source: MixedSource,
        *,
        seed: int,
        batch: int,
        order: OrderConfig,
        loader: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
        rank: int = 0,
        ranks: int = 1,
        reads: bool = True,
    ) -> None:
        """`batch` is the global batch size; the other arguments are those of `Stream`."""
        problems = order.problems(batch, ranks)
        if problems:
            raise ConfigError.from_problems(problems)
        self._source, self._reads = source, reads
        shares = [part.share for part in source.parts]
        self.shares = Shares(shares, seed, batch, order.lanes)
        self._streams = [
            Stream(
                part.source,
                seed=set_seed(seed, number),
                batch=order.lanes,
                order=order,
                loader=_of_set(loader, self.shares.per_lane * float(part.share)),
                rank=rank,
                ranks=ranks,
                reads=reads,
            )
            for number, part in enumerate(source.parts)
        ]
        lanes = order.lanes // ranks
        self._lanes = slice(rank * lanes, (rank + 1) * lanes)
        self.state = MixtureState(
            shares=tuple(map(share_text, shares)),
            seed=seed,
            batch=batch,
            version=VERSION,
            step=0,
            sets=tuple(stream.state for stream in self._streams),
        )

    def resume(self, state: Position, source: MixedSource | None = None) -> None:
        """Continue after the batch of this state; `source`: other versions of the data sets.

        Raises: ConfigError if the data, the shares or the order differ.
        """
        own = self.state if source is None else self.state.of(source.fingerprints)
        problems = own.problems(state)
        if problems or isinstance(state, StreamState):
            raise ConfigError.from_problems(problems)
        sources = [None] * len(self._streams) if source is None else source.sources
        for stream, position, version in zip(self._streams, state.sets, sources, strict=True):
            stream.resume(position, version)
        self.state = replace(state, sets=tuple(stream.state for stream in self._streams))

    def next_epoch(self, source: Any = None) -> None:
        """A mixture has no epochs: an iteration does not end."""

    def __iter__(self) -> Generator[tuple[Any, MixtureState], None, None]:
        state = self.state
        drawn = self.shares.drawn(state.step)
        with ExitStack() as stack:
            readers = [
                _Reader(stream, int(least), stack)
                for stream, least in zip(self._streams, drawn.min(0), strict=True)
            ]
            for step in count(state.step):
                after = drawn + self.shares.counts(step)
                records = self._batch(readers, drawn[self._lanes], after[self._lanes])
                sets = zip(readers, after.min(0).tolist(), strict=True)
                positions = tuple(reader.forget(least) for reader, least in sets)
                drawn = after
                if (0, step) not in state.passed:
                    self.state = replace(state, step=step + 1, sets=positions)
                    yield records, self.state

    def _batch(self, readers: list["_Reader"], drawn: _Counts, after: _Counts) -> Any:
        """This rank's records of a step; `drawn` and `after` it: of its lanes, (lanes, sets)."""
        first = np.arange(len(drawn)) * self.shares.per_lane
        starts = first[:, None] + np.cumsum(after - drawn, axis=1) - (after - drawn)
        pieces: list[tuple[Any, _Counts, _Counts]] = []
        for number, reader in enumerate(readers):
            before, end = drawn[:, number], after[:, number]
            for place in range(int(before.min()), int(end.max())):
                records = reader.records(place)
                lanes = np.flatnonzero((before <= place) & (place < end))
                if self._reads and len(lanes):
                    rows = starts[lanes, number] + place - before[lanes]
                    pieces.append((records, lanes, rows))
        return type(pieces[0][0]).gather(pieces) if pieces else self._source.empty()


class _Reader:
    """A set's stream, and its records that not all lanes have drawn yet."""

    def __init__(self, stream: Stream, first: int, stack: ExitStack) -> None:
        """`first`: the record of each lane at which the stream begins."""
        self._batches = iter(stream)
        stack.callback(self._batches.close)
        self._first, self._state = first, stream.state
        self._held: deque[tuple[Any, StreamState]] = deque()

    def records(self, place: int) -> Any:
        """Record number `place` of each lane."""
        while self._first + len(self._held) <= place:
            self._held.append(next(self._batches))
        return self._held[place - self._first][0]

    def forget(self, before: int) -> StreamState:
        """Drop the records before this number; returns the position after them."""
        self.records(before - 1) if before > self._first else None
        while self._first < before:
            _, self._state = self._held.popleft()
            self._first += 1
        return self._state


def set_seed(seed: int, number: int) -> int:
    """The seed of a set's order, so that sets of equal sizes are read in different orders."""
    return key_int(seed, number, "mixture/set")


def _of_set(loader: LoaderConfig, records: float) -> LoaderConfig:
    """The settings for a set of which a lane draws so many records a step."""
    return replace(loader, prefetch=max(1, round(loader.prefetch * records)))


class Batches(Protocol):
    """What training reads: a Stream or a MixtureStream."""

    state: Any
    """The position after the last batch."""

    def resume(self, state: Any, source: Any = None) -> None:
        """Continue after the batch of this position; `source`: another version of the data.

        Raises: ConfigError if the data or the order differ.
        """

    def next_epoch(self, source: Any = None) -> None:
        """Go on from a pause to the next epoch; `source`: another version of the data."""

    def __iter__(self) -> Generator[tuple[Any, Any], None, None]: ...


def open_stream(source: Any, *, pauses: bool = False, **settings: Any) -> Batches:
    """The stream of a data set or of a mixture; the settings are those of `Stream`."""
    if isinstance(source, MixedSource):
        return MixtureStream(source, **settings)
    return Stream(source, pauses=pauses, **settings)


def epochs_of(position: Position, source: Any) -> dict[str, int]:
    """The epoch for a row of metrics; of a mixture the least, and that of each data set."""
    if isinstance(position, StreamState):
        return {"epoch": position.epoch}
    epochs = [each.epoch for each in position.sets]
    names = [f"epoch/{part.name}" for part in parts_of(source)]
    return {"epoch": min(epochs), **dict(zip(names, epochs, strict=True))}
