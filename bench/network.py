"""Steps a second with and without compression over a slow link, the break-even, and the overlap.

Two namespaces are two machines with one rank each; tbf limits the link. The model has 20M
parameters and short samples, so that gradients dominate as they do between machines. `plain` and
`compressed` are engine reference, which overlaps nothing; the others are engine torch.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from bench.support.link_figures import RANK, Figures, Passes, Task
from bench.support.machines import Machines, two_machines
from bench.support.planned_link import break_even, exposed
from bench.support.rows import Row, bench_row
from bench.support.sizes import sized

SLOW = sized(100.0, 1000.0)
"""Megabits a second."""
SWEEP = sized((300.0, 600.0, 900.0, 1300.0, 2000.0), (300.0, 2000.0))
HIDDEN = 1000.0
"""Of the row about overlap: the link takes about as long as the backward pass of its samples."""
SAMPLES = sized(16, 2)
STEPS, ROUNDS = sized(2, 1), sized(4, 1)
PAIRS = (("torch plain", "torch compressed"), ("torch plain 16", "torch compressed 16"))
SWEPT = ("plain", "compressed", "torch plain", "torch compressed", "torch alone", "torch local")
HOOK = ("torch plain", "torch alone")
PORTS = iter(range(29_700, 29_990))


def run() -> list[Row]:
    """Rows: steps/s at 100 Mbit/s by engine, ratios of bytes, break-evens, and the overlap."""
    with two_machines() as machines:
        machines.shape(SLOW)
        slow = _measure(machines, [*SWEPT[:2], *PAIRS[0], *PAIRS[1]])
        rows = [_steps(slow, "plain", "compressed", "")]
        for pair, kind in zip(PAIRS, ("fp32", "16-bit"), strict=True):
            rows.append(_steps(slow, *pair, f"torch, {kind}, "))
            rows.append(_share(slow, *pair, f"torch, {kind}, "))
        rows += _break_evens(machines)
        rows.append(_overlap(machines))
        return rows


def _steps(figures: Figures, plain: str, compressed: str, prefix: str) -> Row:
    taken = {name: statistics.median(figures.seconds[name]) for name in (plain, compressed)}
    size = f"{figures.parameters / 1e6:.1f}M parameters"
    return bench_row(
        f"{prefix}{SLOW:g} Mbit/s, {size}, rank {RANK}",
        1 / taken[compressed],
        "steps/s",
        f"uncompressed {1 / taken[plain]:.3f} steps/s",
        _ratios(figures, plain, compressed),
    )


def _share(figures: Figures, plain: str, compressed: str, prefix: str) -> Row:
    """The ratio of step times over the ratio of bytes: 1 if the link is all that counts."""
    less = figures.sent[plain] / figures.sent[compressed]
    ratios = _ratios(figures, plain, compressed)
    return bench_row(
        f"{prefix}ratio of step times, rank {RANK}",
        statistics.median(ratios),
        "x",
        f"ratio of bytes {less:.2f}",
        [ratio / less for ratio in ratios],
    )


def _ratios(figures: Figures, plain: str, compressed: str) -> list[float]:
    pairs = zip(figures.seconds[plain], figures.seconds[compressed], strict=True)
    return [p / c for p, c in pairs]


def _break_evens(machines: Machines) -> list[Row]:
    """Sweep the rate; interpolate the payload bandwidth at which compression stops to pay."""
    points = []
    for megabits in SWEEP:
        machines.shape(megabits)
        points.append(_measure(machines, SWEPT))
        print(f"{megabits:g} Mbit/s: {asdict(points[-1])}", file=sys.stderr)
    return [
        _break_even(
            f"advisor's break-even bandwidth, rank {RANK}",
            _crossing(points, "plain", "compressed"),
            [point.break_even for point in points],
        ),
        _break_even(
            f"torch: plan's break-even bandwidth, rank {RANK}",
            _crossing(points, "torch plain", "torch compressed"),
            [break_even(point) for point in points],
        ),
    ]


def _break_even(name: str, measured: float, predicted: list[float]) -> Row:
    middle = statistics.median(predicted)
    return bench_row(
        name,
        middle / 1e6,
        "MB/s",
        f"measured {measured / 1e6:.0f} MB/s",
        [each / measured for each in predicted],
        ratio=middle / measured,
    )


def _crossing(points: Iterable[Figures], plain: str, compressed: str) -> float:
    """Bandwidth at which a least-squares line of gain over seconds a byte crosses zero."""
    rows = [
        (
            1 / point.bandwidth,
            statistics.median(point.seconds[plain]) - statistics.median(point.seconds[compressed]),
        )
        for point in points
    ]
    slope, gain = statistics.linear_regression(*zip(*rows, strict=True))
    return -slope / gain


def _overlap(machines: Machines) -> Row:
    """The share of the hook's reductions that lengthens the step, and plan's share of it."""
    machines.shape(HIDDEN)
    figures = _measure(machines, HOOK, SAMPLES)
    alone = statistics.median(figures.alone)
    rounds = zip(*(figures.seconds[name] for name in HOOK), strict=True)
    shares = [(plain - bare) / alone for plain, bare in rounds]
    predicted = exposed(figures)
    return bench_row(
        f"torch, {HIDDEN:g} Mbit/s: exposed share of reductions of {alone:.3f} s",
        statistics.median(shares),
        "share",
        f"plan's {predicted:.3f}",
        [share / predicted for share in shares],
    )


def _measure(machines: Machines, contenders: Iterable[str], samples: int = 2) -> Figures:
    task = Task(contenders=list(contenders), samples=samples, steps=STEPS, rounds=ROUNDS)
    command = ["bench.support.link_rank", json.dumps(asdict(task))]
    body: dict[str, Any] = json.loads(machines.run(command, 1, next(PORTS))[0].splitlines()[-1])
    return Figures(**{**body, "passes": [Passes(**row) for row in body["passes"]]})
