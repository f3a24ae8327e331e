"""Which data set fills each slot of a mixture's batches: exact shares, computed at any step.

    slot        0   1   2   3   4   5   6   7        G slots, C lanes, G/C slots a lane
    point      (slot + d) / G, with one d in [0, 1) for the whole step
    set         0   0   0   0   0   1   1   2        the set whose part of [0, 1) holds the point

Sets divide [0, 1) by their shares, and the points are evenly spaced, so that every batch holds
share * G records of each set, rounded up or down; any `period` consecutive batches hold exactly
that. Lane l takes every C-th point. Which ones, and d, change at each step by a constant stride
modulo `period` * C, near the golden ratio: each lane too draws every set evenly, and lanes of a set
stay within a few records of each other. What was drawn before a step is a sum of rounded-down
linear terms, which has a closed form.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from core.keys import key_int

VERSION = 1
_GOLDEN = (math.sqrt(5) - 1) / 2
_TRIED = 64
"""Strides that are tried on each side of the golden ratio."""


class Shares:
    """The number of records that each lane draws of each set at each step."""

    def __init__(self, shares: Sequence[Fraction], seed: int, batch: int, lanes: int) -> None:
        """`shares` sum to 1; `batch` is the global batch size, a multiple of `lanes`."""
        ends = list(accumulate(shares))
        self.lanes, self.per_lane = lanes, batch // lanes
        self.period = math.lcm(*((batch * end).denominator for end in ends))
        """Consecutive batches that hold exactly each set's share."""
        self._modulus = lanes * self.period
        self._bounds = [int(batch * self.period * end) for end in (Fraction(0), *ends)]
        self._stride = _stride(self._modulus)
        offset = key_int(seed, "mixture") % self._modulus
        self._starts = [(self.period * lane + offset) % self._modulus for lane in range(lanes)]

    def counts(self, step: int) -> NDArray[np.int64]:
        """The records of each set that each lane draws at a step, (lanes, sets).

        Slots of a lane are in the order of the sets.
        """
        turned = step * self._stride % self._modulus
        phase = (np.asarray(self._starts) + turned) % self._modulus
        below: NDArray[np.int64]
        below = (np.asarray(self._bounds) - phase[:, None] + self._modulus - 1) // self._modulus
        return below[:, 1:] - below[:, :-1]

    def drawn(self, step: int) -> NDArray[np.int64]:
        """The records of each set that each lane has drawn before a step, (lanes, sets)."""
        sets = range(len(self._bounds))
        rows = [[self._below(bound, lane, step) for bound in sets] for lane in range(self.lanes)]
        below = np.array(rows, np.int64)
        return below[:, 1:] - below[:, :-1]

    def drawn_of(self, which: int, lane: int, step: int) -> int:
        """The records of one set that one lane has drawn before a step."""
        return self._below(which + 1, lane, step) - self._below(which, lane, step)

    def step_of(self, which: int, lane: int, draw: int) -> int:
        """The step at which a lane draws its record number `draw`, from 0, of a set."""
        most = 1
        while self.drawn_of(which, lane, most) <= draw:
            most *= 2
        return bisect_right(range(most), draw, key=lambda s: self.drawn_of(which, lane, s)) - 1

    def _below(self, bound: int, lane: int, step: int) -> int:
        """The records of all sets before a bound that a lane has drawn before a step."""
        modulus, start = self._modulus, self._starts[lane]
        last = start + (step - 1) * self._stride
        rounded_up = self._bounds[bound] + modulus - 1
        return _floor_sum(step, modulus, self._stride, rounded_up - last) + _floor_sum(
            step, modulus, self._stride, start
        )


def _stride(modulus: int) -> int:
    """A number without common divisor whose multiples are evenly spread modulo `modulus`.

    Near the golden ratio, with the smallest sum of partial quotients: it bounds the discrepancy.
    """
    middle = round(modulus * _GOLDEN)
    near = range(max(1, middle - _TRIED), middle + _TRIED + 1)
    coprime = (stride for stride in near if math.gcd(stride, modulus) == 1)
    return min(coprime, key=lambda stride: (_quotients(stride, modulus), stride))


def _quotients(numerator: int, denominator: int) -> int:
    """The sum of a fraction's partial quotients."""
    total = 0
    while numerator:
        quotient, rest = divmod(denominator, numerator)
        total, denominator, numerator = total + quotient, numerator, rest
    return total


def _floor_sum(count: int, modulus: int, slope: int, start: int) -> int:
    """Sum of (start + slope * i) // modulus over i < count, as in Euclid's algorithm."""
    total = 0
    while count > 0:
        whole, slope = divmod(slope, modulus)
        total += whole * count * (count - 1) // 2
        whole, start = divmod(start, modulus)
        total += whole * count
        count, start = divmod(slope * count + start, modulus)
        modulus, slope = slope, modulus
    return total
