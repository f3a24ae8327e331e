"""plan's model of a link, on passes whose overlap is known by hand."""

import pytest

from bench.support.link_figures import Figures, Passes
from bench.support.planned_link import break_even, exposed

MEGA = 1_000_000


def _figures(backward: dict[str, float], forward: float = 0.0, **others: object) -> Figures:
    passes = [Passes(forward=forward, backward=backward)]
    seconds = {"torch alone": [2.0], "torch local": [3.0]}
    """A second of factors."""
    return Figures(seconds=seconds, sent={}, passes=passes, **others)  # type: ignore[arg-type]


def test_the_last_of_three_reductions_is_exposed() -> None:
    """Each takes a second, as each backward pass after the first unit's does."""
    figures = _figures(
        {"head": 0.0, "block": 1.0, "embedding": 1.0},
        forward=1.0,
        units={"head": 4, "block": 4, "embedding": 4},
        alone=[3.0],
    )
    assert exposed(figures) == pytest.approx(1 / 3)


def test_a_long_reduction_is_exposed_but_for_the_passes_beside_it() -> None:
    figures = _figures({"head": 0.0, "block": 2.0}, units={"head": 30, "block": 10}, alone=[8.0])
    assert exposed(figures) == pytest.approx(6 / 8)


@pytest.mark.parametrize(("latency", "expected"), [(0.0, 80 * MEGA), (0.5, 80 * MEGA / 1.5)])
def test_compression_pays_while_the_link_is_slower(latency: float, expected: float) -> None:
    """A second of factors, and an all-reduce more, save 80 of 100 MB."""
    figures = _figures(
        {"block": 0.0},
        units={"block": 100 * MEGA},
        factored={"block": 20 * MEGA},
        latency=latency,
    )
    assert break_even(figures) == pytest.approx(expected)


def test_factors_are_made_a_pass_after_their_gradient() -> None:
    """8 / b = 2 + 1 + 6 / b, b in MB/s: the head's factors follow the block's backward pass."""
    figures = _figures(
        {"head": 0.0, "block": 2.0},
        units={"head": 4 * MEGA, "block": 4 * MEGA},
        factored={"head": 2 * MEGA},
    )
    assert break_even(figures) == pytest.approx(2 / 3 * MEGA)
