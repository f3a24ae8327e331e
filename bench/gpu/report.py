"""Rows of the GPU benchmark, and timers for its sections."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor

from bench.support.rows import Row, bench_row
from parallel.device import wait_for

ALONE = "none: others are compared with it"
"""Baseline of a figure without a comparison."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Bound that a figure must reach."""

    least: float | None = None
    most: float | None = None
    speed: bool = False
    """Judged only on GPUs at full size."""

    @property
    def text(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"

    @property
    def bound(self) -> float:
        limit = self.least if self.least is not None else self.most
        assert limit is not None, "a target is at least or at most a value"
        return limit

    def reached(self, value: float) -> bool:
        """False for NaN."""
        return value >= self.bound if self.least is not None else value <= self.bound

    def ratio(self, value: float) -> float:
        """At least 1 if the target is reached."""
        if self.least is not None:
            return value / self.bound
        return self.bound / value if value > 0 and self.bound else float(self.reached(value))


def at_least(value: float) -> Target:
    """Lower bound of a speed, judged on GPUs at full size alone."""
    return Target(least=value, speed=True)


class GpuReport:
    """Collects the rows of all sections; each is written at once."""

    def __init__(self, device: torch.device, tiny: bool, output: TextIO) -> None:
        self.device, self.tiny = device, tiny
        self._output, self._section = output, ""

    @property
    def judged(self) -> bool:
        """True if figures of speed are meaningful here."""
        return self.device.type == "cuda" and not self.tiny

    def begin(self, section: str) -> None:
        """All rows are of this section now."""
        self._section = section
        self._write({"begin": section})

    def end(self, seconds: float) -> None:
        """The section is over."""
        self._write({"end": self._section, "seconds": round(seconds, 2)})

    def row(
        self,
        name: str,
        value: float,
        unit: str = "",
        target: Target | None = None,
        *,
        baseline: str = "",
        spread: Sequence[float] = (),
        **more: Any,
    ) -> None:
        """One figure. `baseline` names the comparison; a ratio above 1 is better than the target.

        `spread` are the same figure's values in all rounds.
        """
        passed = None
        if target is not None and (self.judged or not target.speed):
            passed = target.reached(value)
        text = f"target {target.text}" if target else ""
        ratios = [target.ratio(one) if target else 1.0 for one in (value, *spread)]
        beside = ", ".join(part for part in (baseline, text) if part) or ALONE
        self._write(
            {
                "section": self._section,
                **bench_row(name, value, unit, beside, ratios[1:] or ratios, ratio=ratios[0]),
                "target": target.text if target else "",
                "passed": passed,
                **more,
            }
        )

    def absent(self, name: str, why: str) -> None:
        """A figure that cannot be measured here, and why; not a failure."""
        self.row(name, 0.0, baseline=f"not run: {why}", absent=True)

    def failed(self, name: str, why: str) -> None:
        """A failure in place of a figure."""
        self._write(failed_row(self._section, name, why))

    def _write(self, row: Row) -> None:
        print(json.dumps(row), file=self._output, flush=True)


def failed_row(section: str, name: str, why: str) -> Row:
    """The row of a failure."""
    return {
        "section": section,
        **bench_row(name, 0.0, "", why, [0.0]),
        "target": "",
        "passed": False,
    }


def seconds(
    work: Callable[[], object], device: torch.device, warm: int = 3, rounds: int = 7
) -> list[float]:
    """Seconds of some rounds, after some that are not timed; on a GPU by its events."""
    for _ in range(warm):
        work()
    wait_for(device)
    return [_one(work, device) for _ in range(rounds)]


def _one(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def wall_seconds(work: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds on the host's clock until the device is done, as a user waits."""
    times = []
    for _ in range(rounds):
        wait_for(device)
        began = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return times


def rates(amount: float, spent: Sequence[float]) -> tuple[float, list[float]]:
    """Median and all of an amount a second."""
    return amount / statistics.median(spent), [amount / one for one in spent]


def relative(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact value; NaN stays NaN."""
    a, b = value.detach().double().cpu(), exact.detach().double().cpu()
    return float((a - b).norm() / b.norm())
