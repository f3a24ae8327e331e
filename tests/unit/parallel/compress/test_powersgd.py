"""PowerSGD on one process, against its definition."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.device import CPU
from tests.forked import forked_ranks

SHAPES = {"wide": (6, 20), "tall": (20, 6), "square": (8, 8)}


def _shards() -> list[MatrixShard]:
    return [MatrixShard(name=n, rows=r, columns=c) for n, (r, c) in SHAPES.items()]


def _gradients(seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    matrices = {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}
    return {**matrices, "bias": torch.randn(5, generator=draws)}


def _powersgd(rank: int = 2, **flags: bool) -> PowerSGD:
    return PowerSGD(_shards(), rank=rank, seed=0, group=None, device=CPU, **flags)


def test_full_rank_returns_the_gradient_and_its_norm() -> None:
    gradients = _gradients(0)
    reduced = _powersgd(rank=8).reduce(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(reduced.gradients[name], gradient, rtol=1e-5, atol=1e-5)
    exact = sum(float(g.square().sum()) for g in gradients.values())
    assert float(reduced.norm_squared) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("warm", [False, True])
def test_error_feedback_loses_nothing(warm: bool) -> None:
    powersgd = _powersgd(warm_start=warm)
    given = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    handed = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(7):
        gradients = _gradients(step)
        reduced = powersgd.reduce(gradients)
        for name in SHAPES:
            given[name] += gradients[name]
            handed[name] += reduced.gradients[name]
    errors = powersgd.errors()
    for name in SHAPES:
        assert float((given[name] - handed[name]).norm()) > 0.1
        torch.testing.assert_close(handed[name] + errors[name], given[name], rtol=1e-5, atol=1e-4)


def test_without_feedback_the_remainder_is_dropped() -> None:
    powersgd = _powersgd(error_feedback=False)
    first = powersgd.reduce(_gradients(0)).gradients
    powersgd.reduce(_gradients(1))
    again = powersgd.reduce(_gradients(0)).gradients
    for name in SHAPES:
        torch.testing.assert_close(first[name], again[name])


def test_a_matrix_of_rank_two_is_caught_by_one_warm_step() -> None:
    draws = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 2, generator=draws) @ torch.randn(2, 20, generator=draws)
    reduced = _powersgd().reduce({**_gradients(0), "wide": matrix})
    torch.testing.assert_close(reduced.gradients["wide"], matrix, rtol=1e-4, atol=1e-4)


def test_fixed_q_is_drawn_from_name_and_shard_and_stays() -> None:
    powersgd = _powersgd()
    before = {name: q.clone() for name, q in powersgd.bases().items()}
    powersgd.reduce(_gradients(0))
    assert all(powersgd.bases()[name].equal(q) for name, q in before.items())
    other = PowerSGD(
        [MatrixShard(name="wide", rows=6, columns=20, shard=1)],
        rank=2,
        seed=0,
        group=None,
        device=CPU,
    )
    assert not other.bases()["wide"].equal(before["wide"])
    warm = _powersgd(warm_start=True)
    warm.reduce(_gradients(0))
    assert not warm.bases()["wide"].equal(before["wide"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["wide", "bias"])
def test_a_gradient_that_is_not_finite_leaves_the_errors_alone(bad: float, name: str) -> None:
    powersgd = _powersgd()
    powersgd.reduce(_gradients(0))
    kept = {n: e.clone() for n, e in powersgd.errors().items()}
    sums = {n: e.clone() for n, e in kept.items()}
    broken = _gradients(1)
    broken[name].view(-1)[3] = bad
    reduced = powersgd.reduce(broken)
    assert float(reduced.norm_squared) == math.inf
    for n in SHAPES:
        left = powersgd.errors()[n] + reduced.gradients[n]
        torch.testing.assert_close(left, sums[n], rtol=1e-5, atol=1e-5)
    assert math.isfinite(float(powersgd.reduce(_gradients(2)).norm_squared))


def test_an_error_that_overflowed_starts_again_from_zero() -> None:
    powersgd = _powersgd()
    huge = {n: g * 1e38 * 3 for n, g in _gradients(0).items()}
    huge = {n: g.clamp(-3e38, 3e38) for n, g in huge.items()}
    for _ in range(3):
        assert float(powersgd.reduce(huge).norm_squared) == math.inf
    assert all(bool(torch.isfinite(e).all()) for e in powersgd.errors().values())


def test_a_zero_gradient_comes_back_as_zero() -> None:
    zeros = {name: torch.zeros_like(g) for name, g in _gradients(0).items()}
    reduced = _powersgd().reduce(zeros)
    assert all(not g.any() for g in reduced.gradients.values())


def test_state_comes_back() -> None:
    one, two = _powersgd(warm_start=True), _powersgd(warm_start=True)
    one.reduce(_gradients(0))
    two.load(one.errors(), one.bases())
    a, b = one.reduce(_gradients(1)), two.reduce(_gradients(1))
    assert all(a.gradients[name].equal(b.gradients[name]) for name in a.gradients)


def test_bytes_are_those_of_the_factors() -> None:
    reduced = _powersgd().reduce(_gradients(0))
    assert reduced.raw_bytes == 4 * (120 + 120 + 64 + 5)
    assert reduced.sent_bytes == 4 * (2 * 26 + 2 * 26 + 2 * 16 + 5 + 1)


def test_16_bit_factors_lose_nothing_but_time(tmp_path: Path) -> None:
    """Two ranks: what is not handed out is owed, rounding included, and goes out later; all else is
    sent in fp32."""

    def rank(number: int) -> Any:
        power = PowerSGD(_shards(), rank=2, seed=0, group=dist.group.WORLD, device=CPU,
                         payload=torch.bfloat16)  # fmt: skip
        rows = []
        for step in range(6):
            reduced = power.reduce(_gradients(2 * step + number))
            rows.append({name: g.tolist() for name, g in reduced.gradients.items()})
        owed = {name: error.tolist() for name, error in power.errors().items()}
        return rows, owed, reduced.sent_bytes

    (rows, owed0, sent), (others, owed1, _) = forked_ranks(tmp_path, 2, rank)
    assert rows == others
    factors = sum(2 * sum(shape) for shape in SHAPES.values())
    assert sent == 2 * factors + 4 * (5 + 1)
    for name in SHAPES:
        handed = sum(torch.tensor(row[name]) for row in rows)
        given = sum(_gradients(n)[name] for n in range(12))
        owed = torch.tensor(owed0[name]) + torch.tensor(owed1[name])
        torch.testing.assert_close(2 * handed + owed, given, rtol=1e-5, atol=1e-4)
    exact = sum(_gradients(n)["bias"] for n in (0, 1)) / 2
    torch.testing.assert_close(torch.tensor(rows[0]["bias"]), exact)
