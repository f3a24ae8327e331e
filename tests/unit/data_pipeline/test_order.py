"""Properties of the lane order and its stream, for any sizes, ranks and kills."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.order import CountedSource, amplification
from core.errors import ConfigError
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.tokens import TokenBuffer, TokenRecord, TokenRecords
from data_pipeline.streaming.order import LaneOrder
from data_pipeline.streaming.state import StreamState
from data_pipeline.streaming.stream import Stream


def flat(parts: Iterable[list[int]]) -> list[int]:
    """Concatenates lists."""
    return list(itertools.chain.from_iterable(parts))


class NumberedSource:
    """Records are consecutive numbers, in blocks of the given sizes."""

    fingerprint = "numbered"

    def __init__(self, sizes: list[int], variants: int = 1) -> None:
        self.sizes = np.asarray(sizes)
        self.variants = variants
        self._starts = np.cumsum([0, *sizes])
        self.reads: Counter[int] = Counter()

    def read(self, block: int, variant: int = 0) -> TokenRecords:
        self.reads[block] += 1
        return TokenRecords.of(
            [
                TokenRecord(
                    id=int(self._starts[block]) + i,
                    image=np.full(2, variant, np.uint16),
                    text=np.full(i % 3, block % 97, np.uint16),
                )
                for i in range(int(self.sizes[block]))
            ]
        )

    def buffer(self, sizes: Any, free: Any = None) -> TokenBuffer:
        return TokenBuffer(sizes, 2, free)

    def empty(self) -> TokenRecords:
        raise AssertionError("every rank reads")


def _take(stream: Stream, count: int) -> list[tuple[list[int], StreamState]]:
    batches = iter(stream)
    taken = [
        (records.ids.tolist(), state) for records, state in (next(batches) for _ in range(count))
    ]
    batches.close()  # type: ignore[attr-defined]
    return taken


@pytest.mark.seconds
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=16, max_size=60),
    lanes=st.sampled_from([2, 4, 8]),
    per_lane=st.integers(1, 3),
    window=st.integers(1, 5),
    ahead=st.integers(1, 9),
    data=st.data(),
)
def test_a_stream_killed_anywhere_goes_on_with_any_number_of_ranks(
    sizes: list[int], lanes: int, per_lane: int, window: int, ahead: int, data: st.DataObject
) -> None:
    source = NumberedSource(sizes)
    order = OrderConfig(lanes=lanes, shuffle_buffer=window)
    batch = lanes * per_lane

    def stream(rank: int, ranks: int, state: StreamState | None) -> Stream:
        loader = LoaderConfig(readers=2, prefetch=ahead)
        reader = Stream(
            source, seed=5, batch=batch, order=order, loader=loader, rank=rank, ranks=ranks
        )
        if state is not None:
            reader.resume(state)
        return reader

    try:
        plan = stream(0, 1, None).order
    except ConfigError:
        return
    total = plan.steps(0) + min(3, plan.steps(1))
    unbroken = [ids for ids, _ in _take(stream(0, 1, None), total)]
    assert max(Counter(flat(unbroken[: plan.steps(0)])).values()) == 1
    for step in range(plan.steps(0)):
        places = plan.places(0, step, range(lanes))
        starts = np.cumsum([0, *sizes])
        assert (starts[places[:, 0]] + places[:, 1]).tolist() == unbroken[step]
    done: list[list[int]] = []
    state: StreamState | None = None
    while len(done) < total:
        ranks = data.draw(st.sampled_from([r for r in (1, 2, 4, 8) if lanes % r == 0]))
        count = data.draw(st.integers(1, total - len(done)))
        parts = [_take(stream(rank, ranks, state), count) for rank in range(ranks)]
        done += [flat(part[i][0] for part in parts) for i in range(count)]
        state = parts[0][-1][1]
        assert all(part[-1][1] == state for part in parts)
    assert done == unbroken


def test_every_block_is_fetched_once_an_epoch_at_every_number_of_ranks() -> None:
    sizes = np.full(512, 8)
    for ranks in (1, 8, 64):
        source = CountedSource(sizes)
        order = LaneOrder(sizes, 1, 64, OrderConfig(lanes=64, shuffle_buffer=4))
        assert amplification(source, order, ranks, 64) == pytest.approx(1.0)
        assert source.blocks == len(sizes)


def test_a_stream_keeps_no_more_than_its_lanes_windows() -> None:
    source = NumberedSource([4] * 256)
    stream = Stream(source, seed=1, batch=8, order=OrderConfig(lanes=4, shuffle_buffer=8))
    _take(stream, 30)
    needed = 4 * 30 * 2 // 4  # lanes * records per lane / records per block; the rest is prefetch
    assert max(source.reads.values()) == 1
    assert len(source.reads) <= needed + 4 * 16


def test_epochs_read_the_variants_in_turn() -> None:
    source = NumberedSource([4] * 16, variants=3)
    stream = Stream(source, seed=1, batch=16, order=OrderConfig(lanes=4, shuffle_buffer=2))
    batches = iter(stream)
    seen = {}
    for _ in range(20):
        records, state = next(batches)
        seen.setdefault(state.epoch, set()).update(records.image.flatten().tolist())
    assert [seen[epoch] for epoch in range(5)] == [{0}, {1}, {2}, {0}, {1}]


def test_batches_that_are_passed_over_are_left_out_and_nothing_else() -> None:
    source = NumberedSource([4] * 32)

    def stream() -> Stream:
        return Stream(source, seed=1, batch=8, order=OrderConfig(lanes=4, shuffle_buffer=2))

    whole = _take(stream(), 12)
    passing = stream()
    passing.resume(passing.state.passing([(0, 2), (0, 3), (0, 7)]))
    left = [ids for i, (ids, _) in enumerate(whole) if i not in (2, 3, 7)]
    assert [ids for ids, _ in _take(passing, 9)] == left


def test_a_state_of_other_data_or_order_is_refused() -> None:
    stream = Stream(
        NumberedSource([4] * 32), seed=1, batch=8, order=OrderConfig(lanes=4, shuffle_buffer=2)
    )
    for name, value in (("fingerprint", "other"), ("seed", 2), ("lanes", 8), ("version", 1)):
        with pytest.raises(ConfigError, match=f"the data's {name} was"):
            stream.resume(dataclasses.replace(stream.state, **{name: value}))
