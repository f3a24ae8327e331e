"""The simulation of `bench goodput` against its closed form and numbers worked out by hand."""

import statistics

import pytest

from bench import goodput
from bench.goodput import Costs, expected, simulate
from planning.checkpoint_size import checkpoint_bytes
from planning.config import settings_of

COSTS = Costs(hold=1.0, write=10.0, restart=1210.0)


def test_the_closed_form_by_hand() -> None:
    """28,800 s between failures: exp(-1220 / 28800) = 0.958524, and a checkpoint each 300 s costs
    (300 / 28800) / (exp(301 / 28800) - 1) = 0.991478."""
    assert goodput.DAY / goodput.FAILURES_A_DAY == 28_800.0
    assert expected(COSTS, 300.0) == pytest.approx(0.958524 * 0.991478, rel=2e-6)
    assert expected(Costs(hold=0.0, write=0.0, restart=0.0), 0.01) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("interval", [60.0, 300.0, 3600.0, 7200.0])
def test_the_simulation_tends_to_the_closed_form(interval: float) -> None:
    shares = [simulate(COSTS, interval, seed) for seed in range(5)]
    assert statistics.mean(shares) == pytest.approx(expected(COSTS, interval), abs=0.003)


def test_a_restart_that_is_longer_than_most_runs_leaves_little() -> None:
    """Failures come during restarts, too: of 10 h each, with 8 h between failures, e^-1.25 pass."""
    costs = Costs(hold=0.0, write=0.0, restart=36_000.0)
    share = statistics.mean(simulate(costs, 60.0, seed) for seed in range(5))
    assert share == pytest.approx(0.2865, abs=0.01)


def test_the_checkpoint_has_all_parts_of_the_12b_preset() -> None:
    parts = checkpoint_bytes(settings_of("paper_12b"))
    assert list(parts) == ["masters", "moments", "average", "errors", "rest"]
    assert sum(parts.values()) == 245_050_109_748 <= 250e9
