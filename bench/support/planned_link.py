"""What plan's model of overlapped steps says of measured passes over a link."""

import statistics
from collections.abc import Mapping

from bench.support.link_figures import Figures
from planning.estimate.hardware import hardware_of
from planning.estimate.overlapped.sharded import Unit, sharded_step

SLOWEST, FASTEST, HALVINGS = 1e5, 1e11, 60
"""Bytes a second between which a break-even is looked for, and how often the range is halved."""


def exposed(figures: Figures) -> float:
    """Fraction of the hook's reductions that lengthens a step."""
    alone = statistics.median(figures.alone)
    whole = sum(figures.units.values())
    between = {name: alone * count / whole for name, count in figures.units.items()}
    return (_seconds(figures, between) - _seconds(figures, {})) / alone


def break_even(figures: Figures) -> float:
    """Bytes a second of an all-reduce's payload below which compressed steps are shorter."""
    low, high = SLOWEST, FASTEST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        if _gained(figures, middle) > 0:
            low = middle
        else:
            high = middle
    return low


def _gained(figures: Figures, bandwidth: float) -> float:
    """Seconds that compression saves a step."""

    def sent(count: int, calls: int) -> float:
        return calls * figures.latency + count / bandwidth

    plain = {name: sent(count, 1) for name, count in figures.units.items()}
    compressed = plain | {name: sent(count, 2) for name, count in figures.factored.items()}
    local, alone = (statistics.median(figures.seconds[n]) for n in ("torch local", "torch alone"))
    factors = dict.fromkeys(figures.factored, (local - alone) / len(figures.factored))
    return _seconds(figures, plain) - _seconds(figures, compressed, factors)


def _seconds(
    figures: Figures, between: Mapping[str, float], factors: Mapping[str, float] | None = None
) -> float:
    """A step whose units take `between` seconds between the machines after their factors."""
    factors = factors or {}
    forward = statistics.median(row.forward for row in figures.passes) / len(figures.units)
    units = [
        Unit(
            forward=forward,
            backward=statistics.median(row.backward[name] for row in figures.passes),
            between=between.get(name, 0.0),
            factors=factors.get(name, 0.0),
        )
        for name in reversed(figures.units)
    ]
    hardware = hardware_of("cpu")
    played = sharded_step(units, 1, keeps=True, update=0.0, hardware=hardware, beside=False)
    return played.seconds
