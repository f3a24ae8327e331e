"""Order, crops and segmentations against plain definitions and hand-computed numbers."""

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.errors import ConfigError, InputError
from core.keys import keyed_rng
from data_pipeline.config import OrderConfig
from data_pipeline.images import crops as images
from data_pipeline.images.decode import FLAT_LOOKS, decode_rgb, inspect
from data_pipeline.streaming.order import LaneOrder
from data_pipeline.text.dropout import DropoutEncoder, _joined

SIZES = [3, 5, 2, 4, 4, 1, 5, 3, 2, 4, 3]


def _by_definition(
    sizes: list[int], seed: int, batch: int, lanes: int, window: int, epoch: int
) -> list[list[tuple[int, int]]]:
    """The definition at the head of order.py with plain lists: global batches, slot by slot."""
    dealt = keyed_rng(seed, epoch, "order/blocks").permutation(len(sizes))
    places = []
    for lane in range(lanes):
        mine = [int(b) for b in dealt[lane::lanes]]
        cuts, at = [0], 1 + lane % window
        while at < len(mine):
            cuts.append(at)
            at += window
        cuts.append(len(mine))
        order: list[tuple[int, int]] = []
        for number, (first, last) in enumerate(pairwise(cuts)):
            records = [(b, r) for b in mine[first:last] for r in range(sizes[b])]
            rng = keyed_rng(seed, epoch, f"{lane}:{number}", "order/window")
            order += [records[i] for i in rng.permutation(len(records))]
        places.append(order)
    each = batch // lanes
    steps = min(len(order) for order in places) // each
    return [
        [record for order in places for record in order[step * each : (step + 1) * each]]
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("lanes", "window", "batch"), [(1, 1, 2), (2, 2, 4), (3, 2, 3), (2, 3, 2), (4, 8, 8), (1, 4, 5)]
)
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_order_is_its_definition(lanes: int, window: int, batch: int, epoch: int) -> None:
    order = LaneOrder(np.array(SIZES), 9, batch, OrderConfig(lanes=lanes, shuffle_buffer=window))
    expected = _by_definition(SIZES, 9, batch, lanes, window, epoch)
    assert order.steps(epoch) == len(expected)
    read = {}
    for step, records in enumerate(expected):
        places = order.places(epoch, step, range(lanes))
        assert [tuple(map(int, row)) for row in places] == records
        for slot, record in enumerate(records):
            read[record] = (step, slot)
        if lanes > 1:
            own = order.places(epoch, step, range(1, lanes))
            assert own.tolist() == [list(r) for r in records[batch // lanes :]]
    for block, size in enumerate(SIZES):
        for record in range(size):
            assert order.locate(epoch, block, record) == read.get((block, record))


def test_windows_of_a_lane_by_hand() -> None:
    """Lane 1 of 2 with windows of 3 begins with one of 2 blocks; there are 7 blocks in lane 0."""
    order = LaneOrder(np.full(13, 2), 0, 2, OrderConfig(lanes=2, shuffle_buffer=3))
    first = [(w.number, w.start, w.end, len(w.blocks), w.key) for w in order.windows(0, 0, 0, 14)]
    assert [row[:4] for row in first] == [(0, 0, 2, 1), (1, 2, 8, 3), (2, 8, 14, 3)]
    assert first[1][4] == (0, 0, 1)
    second = [(w.number, w.start, w.end, len(w.blocks)) for w in order.windows(0, 1, 0, 12)]
    assert second == [(0, 0, 4, 2), (1, 4, 10, 3), (2, 10, 12, 1)]
    assert [w.number for w in order.windows(0, 1, 9, 10)] == [1]
    assert [w.number for w in order.windows(0, 1, 9, 11)] == [1, 2]
    assert [w.number for w in order.windows(0, 1, 4, 10)] == [1]
    assert not list(order.windows(0, 1, 4, 4))


def test_too_few_records_for_a_batch_are_refused_and_just_enough_are_not() -> None:
    config = OrderConfig(lanes=2, shuffle_buffer=2)
    assert LaneOrder(np.array([2, 2]), 0, 4, config).steps(0) == 1
    with pytest.raises(ConfigError, match="4 records in 2 blocks fill no batch of 6"):
        LaneOrder(np.array([2, 2]), 0, 6, config)
    order = LaneOrder(np.array([2, 2]), 0, 4, config)
    assert {order._sizes.dtype, order._deal(0)[1].dtype} == {np.dtype(np.int32)}
    assert LaneOrder(np.array([2**30, 2**30]), 0, 4, config)._sizes.dtype == np.int64
    assert LaneOrder(np.array([2**30, 2**30 - 1]), 0, 4, config)._sizes.dtype == np.int32


class _Fixed:
    """A generator that returns given numbers and records the requested ranges."""

    def __init__(self, *answers: Any) -> None:
        self._answers, self.asked = list(answers), []  # type: ignore[var-annotated]

    def integers(self, low: int, high: int | None = None, size: int | None = None) -> Any:
        self.asked.append((low, high) if size is None else (low, high, size))
        return self._answers.pop(0)


def _ramp(height: int, width: int) -> np.ndarray:
    """Red is the column, green the row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    return image


def _corner(view: np.ndarray) -> tuple[int, int]:
    return int(view[0, 0, 1]), int(view[0, 0, 0])


def test_a_square_is_cut_from_the_middle() -> None:
    assert _corner(images.square(_ramp(9, 20), 9)) == (0, 5)
    assert _corner(images.square(_ramp(20, 9), 9)) == (5, 0)
    halves = images.square(_ramp(8, 16), 4)
    assert halves[..., 0].tolist() == [[4, 6, 8, 10]] * 4 or halves[0, 0, 0] in (4, 5)
    assert halves.shape == (4, 4, 3)
    by_area = images.square(np.array([[[0] * 3, [100] * 3], [[50] * 3, [90] * 3]], np.uint8), 1)
    assert by_area.tolist() == [[[60] * 3]]


@pytest.mark.parametrize(
    ("shape", "low", "high", "offset", "corner"),
    [((32, 48), 6, 10, 7, (1, 9)), ((48, 32), 6, 10, 7, (8, 2)), ((32, 32), 0, 1, 0, (1, 2)),
     ((32, 33), 0, 1, 0, (1, 2)), ((32, 40), 3, 5, 4, (1, 6)), ((32, 35), 1, 2, 1, (1, 3))],
)  # fmt: skip
def test_the_crop_of_the_papers_second_listing(
    shape: tuple[int, int], low: int, high: int, offset: int, corner: tuple[int, int]
) -> None:
    """Excess e: an offset in [3e/8, max(3e/8 + 1, 5e/8)); a size in [28, min(32, 9 * 28/8)]; a
    corner in [0, size - 28]."""
    rng = _Fixed(offset, 32, np.array([1, 2]))
    view = images.prior_crop(_ramp(*shape), 28, rng)  # type: ignore[arg-type]
    assert rng.asked == [(low, high), (28, 32), (0, 5, 2)]
    assert view.shape == (28, 28, 3) and _corner(view) == corner


def test_a_tokenizer_gets_the_crop_that_it_wants() -> None:
    """The central one draws nothing: it starts at half of the 48 pixels of excess."""
    rng = _Fixed(8, 32, np.array([0, 0]))
    view = images.tokenizer_crop(_ramp(32, 80), 32, "center", rng)  # type: ignore[arg-type]
    assert rng.asked == [] and _corner(view) == (0, 24)
    view = images.tokenizer_crop(_ramp(32, 40), 32, "random", rng)  # type: ignore[arg-type]
    assert len(rng.asked) == 3 and _corner(view) == (0, 8)


def test_a_large_picture_is_scaled_to_at_most_nine_eighths() -> None:
    rng = _Fixed(8, 18, np.array([2, 0]))
    view = images.prior_crop(_ramp(64, 80), 16, rng)  # type: ignore[arg-type]
    assert rng.asked == [(6, 10), (16, 19), (0, 3, 2)] and view.shape == (16, 16, 3)
    assert _corner(view)[0] in (8, 9) and view[0, 0, 0] in (9, 10)


def test_the_views_of_the_papers_first_listing_by_hand() -> None:
    """Any square; a size in [9/8, 3/2] of 16; any corner; a flip."""
    rng = _Fixed(3, 5, 20, np.array([1, 4]), 1)
    image = _ramp(20, 30)
    view = images.dvae_crop(image, 16, rng)  # type: ignore[arg-type]
    assert rng.asked == [(0, 1), (0, 11), (18, 21), (0, 5, 2), (2, None)]
    assert view.shape == (16, 16, 3)
    assert (int(view[0, -1, 1]), int(view[0, -1, 0])) == (4, 9) and int(view[0, 0, 0]) == 24
    plain = _Fixed(3, 5, 20, np.array([1, 4]), 0)
    assert _corner(images.dvae_crop(image, 16, plain)) == (4, 9)  # type: ignore[arg-type]
    large = _Fixed(0, 0, 24, np.array([0, 0]), 0)
    images.dvae_crop(_ramp(64, 64), 16, large)  # type: ignore[arg-type]
    assert large.asked == [(0, 1), (0, 1), (18, 25), (0, 9, 2), (2, None)]
    small = _Fixed()
    assert images.dvae_crop(_ramp(15, 30), 16, small).shape == (16, 16, 3)  # type: ignore[arg-type]
    assert small.asked == []
    just = _Fixed(0, 0, 16, np.array([0, 0]), 0)
    images.dvae_crop(_ramp(16, 16), 16, just)  # type: ignore[arg-type]
    assert just.asked[2] == (16, 17)


def _encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_a_look_says_which_neighbours_are_brighter() -> None:
    """Columns of brightness 0 1 0 1 ...: the even columns of 8x8 comparisons across are set.

    Band 0 has (row + column) % 4 = 0: columns 0 and 4, then 3 and 7, 2 and 6, 1 and 5: 11001100.
    """
    stripes = np.repeat(np.tile(np.array([0, 200] * 4 + [0], np.uint8), (8, 1)), 8, 0)
    image = Image.fromarray(np.repeat(stripes, 8, 1))
    assert image.size == (72, 64)
    look = inspect(_encoded(image), "x")
    assert look.look.hex() == "cccc000033330000" * 2 and (look.width, look.height) == (72, 64)
    down = inspect(_encoded(image.transpose(Image.Transpose.TRANSPOSE)), "x")
    assert down.look.hex() == "0000cccc" * 4 and (down.width, down.height) == (64, 72)
    first = np.zeros((64, 72), np.uint8)
    first[:8, 64:] = 255
    assert inspect(_encoded(Image.fromarray(first)), "x").look.hex() == "00" * 12 + "40000000"


def test_flat_pictures_and_ramps_have_the_four_flat_looks() -> None:
    ramp = np.tile(np.linspace(0, 255, 72).astype(np.uint8), (64, 1))
    pictures = [np.zeros_like(ramp), ramp[:, ::-1], ramp, ramp.T]
    looks = [inspect(_encoded(Image.fromarray(one)), "x").look.hex() for one in pictures]
    assert looks == ["00" * 16, "00" * 16, "ffff0000" * 4, "0000ffff" * 4]
    assert {bytes.fromhex(look) for look in looks} | {b"\xff" * 16} == set(FLAT_LOOKS)


def test_colours_of_pixels_by_hand() -> None:
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert decode_rgb(_encoded(clear), "x").tolist() == [[[255, 255, 255]]]
    half = Image.new("LA", (1, 1), (0, 51))
    assert decode_rgb(_encoded(half), "x").tolist() == [[[204] * 3]]
    deep = Image.fromarray(np.array([[0, 256, 65535]], np.uint16))
    assert decode_rgb(_encoded(deep), "x").tolist() == [[[0] * 3, [1] * 3, [255] * 3]]
    again = decode_rgb(images.encode_png(_ramp(2, 3)), "x")
    assert again.tolist() == _ramp(2, 3).tolist()


class _Words:
    """A tokenizer of the letters a, b, c and the merges ab, abc, bc; and a space."""

    def to_str(self) -> str:
        import json

        vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5, "!": 6, "A": 7, "é": 8}
        merges = ["a b", ["ab", "c"], ["b", "c"]]
        return json.dumps({"model": {"vocab": vocabulary, "merges": merges}})


def test_without_dropout_merges_are_done_by_rank() -> None:
    encoder = DropoutEncoder(_Words(), 0.0)  # type: ignore[arg-type]
    assert encoder.encode([4, 6, 1, 2, 7, 0, 8, 0, 1]).tolist() == [4, 6, 5, 7, 0, 8, 3]
    assert encoder.encode([0, 1, 2, 0, 1]).tolist() == [4, 3]
    assert encoder.encode([0, 2, 1]).tolist() == [0, 2, 1]
    assert encoder.encode([]).tolist() == [] and encoder.encode([0]).dtype == np.uint16
    for bad in (-0.1, 1.0):
        with pytest.raises(InputError, match="must be in"):
            DropoutEncoder(_Words(), bad)  # type: ignore[arg-type]


def test_merges_are_passed_over_at_the_rate() -> None:
    """`ab` alone stays two letters with probability 0.3 (four deviations of 4,000: 0.029)."""
    encoder = DropoutEncoder(_Words(), 0.3)  # type: ignore[arg-type]
    apart = [len(encoder.encode([3], 1, i)) == 2 for i in range(4000)]
    assert 0.271 < np.mean(apart) < 0.329
    assert apart == [len(encoder.encode([3], 1, i)) == 2 for i in range(4000)]
    # `bc` of abc where ab is passed over and bc is not: 0.3 * 0.7; abc whole: 0.7 * 0.7
    many = [encoder.encode([4], 2, i).tolist() for i in range(4000)]
    assert 0.18 < np.mean([m == [0, 5] for m in many]) < 0.24
    assert 0.455 < np.mean([m == [4] for m in many]) < 0.525


def test_merges_do_not_overlap() -> None:
    assert _joined(["a", "a", "a", "b"], [0, 1]) == ["aa", "a", "b"]
    assert _joined(["a", "b", "a", "b"], [0, 2]) == ["ab", "ab"]
    assert _joined(["c", "a", "b"], [1]) == ["c", "ab"]
