"""Steps with overlap: streams played by hand, and what today's options change."""

from dataclasses import replace
from typing import Any

import pytest

from planning.estimate.hardware import KNOWN
from planning.estimate.kernels import flops, seconds
from planning.estimate.overlapped import decoder
from planning.estimate.overlapped.runs import play_run, tokens_a_second
from planning.estimate.overlapped.sharded import (
    HOP,
    NETWORK_HOP,
    Unit,
    ring_seconds,
    sharded_step,
)
from planning.estimate.overlapped.step import Sizes, Step
from planning.estimate.overlapped.streams import COMPUTE, Tasks, play
from planning.estimate.overlapped.tensor import tensor_seconds

H100 = KNOWN["h100"]
ALONE = replace(H100, channels=0)
"""Collectives that take nothing from the computation."""
SIZES = Sizes(hidden=4096, heads=32, layers=4, groups=8, wide=14336, vocabulary=32_000, gated=True)
STEP = Step(sizes=SIZES, length=4096, gpus=8, micro=2, accumulate=1, compiled=True)


def test_streams_wait_for_each_other_and_slow_the_computation() -> None:
    """A gather of 1 s, computation of 2 s after it, a second gather beside it, computation."""
    tasks = Tasks()
    first = tasks.add("link", 1.0)
    one = tasks.add(COMPUTE, 2.0, first)
    second = tasks.add("link", 1.0)
    two = tasks.add(COMPUTE, 1.0, second, one)
    alone = play(tasks, 0.0)
    assert alone.ends == pytest.approx([1.0, 3.0, 2.0, 4.0]) and two == 3
    assert (alone.seconds, alone.computed, alone.waited) == pytest.approx((4.0, 3.0, 1.0))
    beside = play(tasks, 0.5)  # half of the rate for the second that the second gather takes
    assert beside.ends == pytest.approx([1.0, 3.5, 2.0, 4.5])
    assert beside.slowed == pytest.approx(0.5) and beside.computed == pytest.approx(3.0)
    assert beside.busy == {"link": 2.0}


def test_a_ring_has_a_step_for_each_rank() -> None:
    inside = ring_seconds(8e9, 8, H100)
    assert inside == pytest.approx(7 / 8 * 8e9 / (0.8 * 450e9) + 7 * HOP)
    across = ring_seconds(16e9, 16, H100)
    assert across == pytest.approx(15 / 16 * 16e9 / (0.8 * 400e9) + 14 * HOP + NETWORK_HOP)
    apart = ring_seconds(8e9, 4, H100, stride=8)  # all eight share their node's network
    assert apart == pytest.approx(3 / 4 * 8e9 / (0.8 * 50e9) + 3 * NETWORK_HOP)
    assert ring_seconds(8e9, 1, H100) == ring_seconds(0.0, 8, H100) == 0.0


def test_gathers_run_beside_the_passes_except_the_first() -> None:
    units = [Unit(forward=1.0, backward=2.0, gather=0.5, scatter=0.5) for _ in range(3)]
    played = sharded_step(units, 1, keeps=False, update=0.0, hardware=ALONE)
    assert played.computed == pytest.approx(9.0)
    assert played.seconds == pytest.approx(0.5 + 9.0 + 0.5)  # first gather, last reduce-scatter
    assert played.busy["machine"] == pytest.approx(3 * 0.5 + 2 * 0.5 + 3 * 0.5)
    kept = sharded_step(units, 2, keeps=True, update=0.0, hardware=ALONE)
    assert kept.busy["machine"] == pytest.approx(2 * (3 * 0.5 + 3 * 0.5))


def test_slow_links_set_the_pace() -> None:
    """Two gathers and a reduction of each unit take 6 s, its passes 3 s."""
    units = [Unit(forward=1.0, backward=2.0, gather=2.0, scatter=2.0) for _ in range(8)]
    played = sharded_step(units, 1, keeps=False, update=0.0, hardware=ALONE)
    links = played.busy["machine"]
    assert links == pytest.approx(8 * 2.0 + 7 * 2.0 + 8 * 2.0)
    assert links <= played.seconds < 1.1 * links


def test_reductions_between_machines_follow_the_shards_once_a_step() -> None:
    units = [
        Unit(forward=1.0, backward=2.0, scatter=0.5, between=1.5, factors=0.25) for _ in range(4)
    ]
    played = sharded_step(units, 3, keeps=True, update=1.0, hardware=ALONE)
    assert played.busy["between"] == pytest.approx(4 * 1.5)
    assert played.computed == pytest.approx(3 * 12.0 + 4 * 0.25 + 1.0)
    # a micro-batch's first pass follows the reduction before it; of the last one, two units'
    # factors hold up the passes, and the last two units' ways follow them
    passes = 36.0 + 2 * 0.5 + 2 * 0.25
    assert played.seconds == pytest.approx(passes + 0.25 + 2 * 1.5 + 1.0)


def test_matmuls_count_the_models_operations() -> None:
    passes = decoder.layer(STEP, H100)
    rows = STEP.micro * STEP.length
    matmuls = flops(k for k in passes.forward if k.rows == rows)
    assert matmuls == 2.0 * rows * SIZES.matrices
    back = sum(k.flops for k in passes.backward if k.rows and not k.moved)
    assert back == 2 * matmuls and passes.again == ()
    parts = [decoder.layer(replace(STEP, tensor=t), H100) for t in (1, 2)]
    whole, half = (flops(k for k in part.forward if k.rows == rows) for part in parts)
    assert half == whole / 2


@pytest.mark.parametrize(
    ("changes", "faster"),
    [
        ({"recompute": "selective"}, False),
        ({"recompute": "full"}, False),
        ({"compiled": False}, False),
        ({"attention": "triton"}, False),
        ({"stage": 2}, True),
        ({"gpus": 512}, False),
    ],
)
def test_options_change_the_step_as_they_should(changes: dict[str, Any], faster: bool) -> None:
    base, other = tokens_a_second(STEP, H100), tokens_a_second(replace(STEP, **changes), H100)
    assert (other > base) == faster and 0.5 < other / base < 1.2


def test_selective_recompute_is_between_none_and_full() -> None:
    work = {
        kind: seconds(decoder.layer(replace(STEP, recompute=kind), H100).again, H100)
        for kind in ("none", "selective", "full")
    }
    assert work["none"] == 0.0 < work["selective"] < work["full"]


def test_asynchronous_tensor_parallelism_hides_a_part() -> None:
    split = replace(STEP, tensor=8, gpus=64, micro=8, recompute="full")
    blocking = tensor_seconds(split, H100)
    hidden = tensor_seconds(replace(split, asynchronous=True), H100)
    assert all(0 < b < a for a, b in zip(blocking, hidden, strict=True))
    assert tensor_seconds(STEP, H100) == (0.0, 0.0)


def test_a_step_is_never_faster_than_its_computation() -> None:
    played = play_run(replace(STEP, gpus=512), H100)
    assert played.seconds == pytest.approx(played.computed + played.slowed + played.waited)
    assert 0 < played.waited < played.computed
