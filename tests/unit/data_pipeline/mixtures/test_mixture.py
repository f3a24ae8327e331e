"""Mixtures: exact shares, each set's own epochs, any ranks and kills, and what is read when."""

import dataclasses
import json
import math
from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import accumulate, count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.tokens import TokenBuffer, TokenRecord, TokenRecords
from data_pipeline.streaming.mixed_source import (
    MixedSource,
    Part,
    first_of_each,
    held_out_counts,
)
from data_pipeline.streaming.mixture import (
    MixtureStream,
    epochs_of,
    open_stream,
    set_seed,
)
from data_pipeline.streaming.order import LaneOrder
from data_pipeline.streaming.reads import Mixture
from data_pipeline.streaming.shares import Shares
from data_pipeline.streaming.state import MixtureState, position_of
from data_pipeline.streaming.stream import Stream

ORDER = OrderConfig(lanes=4, shuffle_buffer=2)
THREE = [Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)]


class NumberedSource:
    """A set's records are consecutive numbers from its first on."""

    def __init__(self, first: int, sizes: list[int], variants: int = 1) -> None:
        self.fingerprint, self.variants = f"numbered-{first}", variants
        self.sizes = np.asarray(sizes)
        self._starts = first + np.cumsum([0, *sizes])

    def read(self, block: int, variant: int = 0) -> TokenRecords:
        image = np.full(2, variant, np.uint16)
        text = np.full(block % 3, block, np.uint16)
        ids = range(int(self._starts[block]), int(self._starts[block + 1]))
        return TokenRecords.of([TokenRecord(id=i, image=image, text=text) for i in ids])

    def buffer(self, sizes: Any, free: Any = None) -> TokenBuffer:
        return TokenBuffer(sizes, 2, free)

    def empty(self) -> list[Any]:
        return []


def mixed(shares: list[Fraction], sizes: list[list[int]]) -> MixedSource:
    """A mixture of numbered sets: set i begins at 1,000,000 i."""
    return MixedSource(
        [
            Part(name=f"s{i}", place=f"s{i}", share=share, source=NumberedSource(10**6 * i, own))
            for i, (share, own) in enumerate(zip(shares, sizes, strict=True))
        ]
    )


def opened(source: MixedSource, batch: int, rank: int = 0, ranks: int = 1, **more: Any) -> Any:
    """The stream of one rank."""
    given_ = {"seed": 3, "order": ORDER, **more}
    return open_stream(source, batch=batch, rank=rank, ranks=ranks, **given_)


def taken(stream: Any, steps: int) -> list[tuple[list[int], Any]]:
    """The ids of some batches, with the positions after them."""
    batches = iter(stream)
    rows = [
        (records.ids.tolist(), state) for records, state in (next(batches) for _ in range(steps))
    ]
    batches.close()
    return rows


def by_hand(source: MixedSource, batch: int, steps: int, seed: int = 3) -> list[list[int]]:
    """The batches by the rule's words: each slot's point, and the next record of its set's lane."""
    shares = Shares([part.share for part in source.parts], seed, batch, ORDER.lanes)
    lanes, ends = range(ORDER.lanes), list(accumulate(part.share for part in source.parts))
    per_lane = batch // ORDER.lanes
    records = [
        [iter(lane) for lane in in_lanes(part.source, set_seed(seed, i), steps * per_lane)]
        for i, part in enumerate(source.parts)
    ]
    batches = []
    for step in range(steps):
        rows = []
        for lane in lanes:
            turned = (shares._starts[lane] + step * shares._stride) % shares._modulus
            for slot in range(per_lane):
                point = (slot + Fraction(turned, shares._modulus)) / per_lane
                which = next(i for i, end in enumerate(ends) if point < end)
                rows.append(next(records[which][lane]))
        batches.append(rows)
    return batches


def in_lanes(source: NumberedSource, seed: int, most: int) -> list[list[int]]:
    """The first records of each lane of a set, epoch after epoch."""
    order = LaneOrder(source.sizes, seed, ORDER.lanes, ORDER)
    rows: list[Any] = []
    for epoch in count():
        for step in range(order.steps(epoch)):
            places = order.places(epoch, step, range(ORDER.lanes))
            rows.append(source._starts[places[:, 0]] + places[:, 1])
        if len(rows) >= most:
            return np.array(rows).T.tolist()  # type: ignore[no-any-return]
    raise AssertionError


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    lanes=st.sampled_from([1, 2, 4, 8]),
    per_lane=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_batch_has_each_share_and_every_period_exactly(
    weights: list[int], lanes: int, per_lane: int, seed: int
) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    batch = lanes * per_lane
    order = Shares(shares, seed, batch, lanes)
    assert sum(weights) % order.period == 0
    total = np.zeros((lanes, len(shares)), np.int64)
    for step in range(min(2 * order.period * lanes, 60)):
        assert (order.drawn(step) == total).all()
        counts = order.counts(step)
        assert (counts.sum(1) == per_lane).all() and counts.min() >= 0
        for got, share in zip(counts.sum(0).tolist(), shares, strict=True):
            assert got in (math.floor(batch * share), math.ceil(batch * share))
        total += counts
        assert np.ptp(total, axis=0).max() <= 7, "lanes of a set stay together"
        if (step + 1) % order.period == 0:
            assert total.sum(0).tolist() == [(step + 1) * batch * share for share in shares]
    for which, lane, draw in [(0, 0, 0), (len(shares) - 1, lanes - 1, 17)]:
        step = order.step_of(which, lane, draw)
        drawn = [order.drawn(at)[lane, which] for at in (step, step + 1)]
        assert drawn[0] <= draw < drawn[1] and drawn[0] == order.drawn_of(which, lane, step)


def test_seven_tenths_of_ten_are_seven_in_every_batch() -> None:
    order = Shares([Fraction(7, 10), Fraction(3, 10)], 0, 20, 4)
    assert order.period == 1
    assert all(order.counts(step).sum(0).tolist() == [14, 6] for step in range(40))
    order = Shares([Fraction(1, 4), Fraction(3, 4)], 0, 2, 2)
    assert order.period == 2
    firsts = [int(order.counts(step)[:, 0].sum()) for step in range(8)]
    assert firsts in ([0, 1] * 4, [1, 0] * 4)


def test_batches_are_those_of_the_rule() -> None:
    source = mixed(THREE, [[3, 5, 4] * 7, [4] * 9, [7] * 5])
    for batch in (4, 8, 12):
        read = [ids for ids, _ in taken(opened(source, batch), 30)]
        assert read == by_hand(source, batch, 30)


def test_each_record_of_an_epoch_is_read_once() -> None:
    sizes = [[5] * 8, [3] * 12, [4] * 4]
    source = mixed(THREE, sizes)
    lanes: dict[tuple[int, int], list[int]] = {}
    for ids, _ in taken(opened(source, 8), 50):
        for slot, record in enumerate(ids):
            lanes.setdefault((record // 10**6, slot // 2), []).append(record)
    for which, own in enumerate(sizes):
        each = sum(own) // 4  # equal blocks in each lane: nothing is left out
        whole = min(len(lanes[which, lane]) for lane in range(4)) // each
        assert whole >= 3
        for epoch in range(whole):
            part = slice(epoch * each, (epoch + 1) * each)
            read = [record for lane in range(4) for record in lanes[which, lane][part]]
            assert sorted(read) == [10**6 * which + i for i in range(sum(own))]


@pytest.mark.seconds
@settings(max_examples=12, deadline=None)
@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=4, max_size=14), min_size=3, max_size=3),
    per_lane=st.integers(1, 3),
    ahead=st.integers(1, 9),
    data=st.data(),
)
def test_a_mixture_killed_anywhere_goes_on_with_any_number_of_ranks(
    weights: list[int],
    sizes: list[list[int]],
    per_lane: int,
    ahead: int,
    data: st.DataObject,
) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    source = mixed(shares, sizes[: len(shares)])
    batch, total = 4 * per_lane, 16
    loader = LoaderConfig(readers=2, prefetch=ahead)
    unbroken = by_hand(source, batch, total)
    done: list[list[int]] = []
    state: Any = None
    while len(done) < total:
        ranks = data.draw(st.sampled_from([1, 2, 4]))
        steps = data.draw(st.integers(1, total - len(done)))
        parts = []
        for rank in range(ranks):
            stream = opened(source, batch, rank, ranks, loader=loader)
            if state is not None:
                stream.resume(position_of(json.loads(json.dumps(state))))
            parts.append(taken(stream, steps))
        done += [[i for part in parts for i in part[at][0]] for at in range(steps)]
        assert all(part[-1][1] == parts[0][-1][1] for part in parts)
        state = dataclasses.asdict(parts[0][-1][1])
    assert done == unbroken


def test_a_rank_that_reads_nothing_has_the_same_positions() -> None:
    source = mixed(THREE, [[3] * 9, [4] * 5, [2] * 8])
    reading = taken(opened(source, 8), 30)
    batches = iter(opened(source, 8, reads=False))
    for _, state in reading:
        records, same = next(batches)
        assert not records and same == state
    batches.close()


def test_one_set_in_a_mixture_reads_as_it_does_alone() -> None:
    """Bit for bit up to the end of the epoch, of which a mixture leaves less out."""
    source = mixed([Fraction(1)], [[4] * 16])
    alone = Stream(source.parts[0].source, seed=set_seed(3, 0), batch=8, order=ORDER)
    mixture = MixtureStream(source, seed=3, batch=8, order=ORDER)
    rows = zip(iter(alone), iter(mixture), strict=False)
    for (left, _), (right, _), _ in zip(
        *zip(*(next(rows) for _ in range(20)), strict=True), range(20), strict=True
    ):
        assert left.ids.tolist() == right.ids.tolist()
        assert left.image.tobytes() == right.image.tobytes()
        assert [r.text.tolist() for r in left] == [r.text.tolist() for r in right]


def test_skipped_batches_are_left_out_and_nothing_else() -> None:
    source = mixed(THREE, [[3] * 9, [4] * 5, [2] * 8])
    whole = [ids for ids, _ in taken(opened(source, 8), 14)]
    stream = opened(source, 8)
    stream.resume(stream.state.passing([(0, 2), (0, 3), (0, 9)]))
    assert [ids for ids, _ in taken(stream, 11)] == [
        ids for i, ids in enumerate(whole) if i not in (2, 3, 9)
    ]


def test_other_sets_shares_or_settings_are_refused() -> None:
    sizes = [[3] * 9, [4] * 5]
    stream = opened(mixed([Fraction(1, 2), Fraction(1, 2)], sizes), 8)
    other = opened(mixed([Fraction(1, 4), Fraction(3, 4)], sizes), 8)
    with pytest.raises(ConfigError, match=r"shares was \('0.25', '0.75'\), now it is"):
        stream.resume(other.state)
    alone = Stream(NumberedSource(0, sizes[0]), seed=3, batch=8, order=ORDER)
    with pytest.raises(ConfigError, match="shares was that of one data set"):
        stream.resume(alone.state)
    with pytest.raises(ConfigError, match="the data's fingerprint was"):
        alone.resume(stream.state)
    with pytest.raises(ConfigError, match="seed"):
        stream.resume(dataclasses.replace(stream.state, seed=4))


def test_what_is_read_when_follows_from_the_order_alone() -> None:
    source = mixed(THREE, [[3, 5, 4] * 5, [4] * 6, [2, 9] * 5])
    steps = 50
    read = [ids for ids, _ in taken(opened(source, 8), steps)]
    orders = [
        LaneOrder(part.source.sizes, set_seed(3, i), ORDER.lanes, ORDER)
        for i, part in enumerate(source.parts)
    ]
    reads = Mixture(Shares(THREE, 3, 8, ORDER.lanes), [partial(_same, order) for order in orders])
    starts = [part.source._starts for part in source.parts]
    for number in (0, 1, 37, 49):
        slots = reads.slots(number)
        assert [int(starts[which][block]) + record for which, _, block, record in slots] == read[
            number
        ]
    for which, block, record in [(0, 4, 2), (0, 0, 0), (1, 5, 3), (1, 0, 0)]:
        number = int(starts[which][block]) + record
        expected = [step for step, ids in enumerate(read) if number in ids]
        place_at = partial(_same, (block, record))
        assert list(reads.batches(which, place_at, steps)) == expected
        assert list(reads.batches(which, place_at, expected[-1])) == expected[:-1]


def _same(value: Any, epoch: int) -> Any:
    return value


def test_each_set_reads_its_variants_by_its_own_epochs() -> None:
    parts = [
        Part(name=str(v), place=str(v), share=share, source=NumberedSource(10**6 * v, [4] * 8, v))
        for v, share in ((1, Fraction(1, 4)), (3, Fraction(3, 4)))
    ]
    source = MixedSource(parts)
    batches, images = iter(opened(source, 8)), Counter[tuple[int, int]]()
    for _ in range(64):
        records, state = next(batches)
        for record in records:
            images[record.id // 10**6, int(record.image[0])] += 1
    batches.close()
    assert epochs_of(state, source)["epoch/1"] < epochs_of(state, source)["epoch/3"]
    assert images == {(1, 0): 128, (3, 0): 128, (3, 1): 128, (3, 2): 128}


def test_validation_reads_each_sets_share_in_whole_lanes() -> None:
    source = mixed(THREE, [[100] * 4, [100] * 4, [30]])
    assert held_out_counts(source, 512, 8) == [256, 152, 24]
    assert held_out_counts(source, 8, 8) == [8, 8, 8]
    assert held_out_counts(source.parts[0].source, 70, 8) == [64]
    assert [r.id // 10**6 for r in first_of_each(source, 10)] == [0] * 5 + [1] * 3 + [2] * 2
    assert [r.id for r in first_of_each(source.parts[1].source, 3)] == [10**6 + i for i in range(3)]


def test_a_mixture_read_by_blocks_has_those_of_all_sets() -> None:
    source = mixed(THREE, [[3, 2], [4], [1, 1, 5]])
    ids = [record.id for block in range(len(source.sizes)) for record in source.read(block)]
    assert ids == [10**6 * i + n for i, count in enumerate((5, 4, 7)) for n in range(count)]
    assert source.sizes.tolist() == [3, 2, 4, 1, 1, 5]


def test_positions_survive_json() -> None:
    state = opened(mixed(THREE, [[3] * 9, [4] * 5, [2] * 8]), 8).state
    assert position_of(json.loads(json.dumps(dataclasses.asdict(state)))) == state
    assert isinstance(state, MixtureState)
    one = state.sets[0]
    assert position_of(json.loads(json.dumps(dataclasses.asdict(one)))) == one
