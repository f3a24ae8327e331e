"""Settings of the always-on profile and of traces; imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """The always-on profile, and traces of some steps."""

    always: bool = True
    """Record the time of every step by category on every rank; `tapir profile` shows it."""
    steps: str = ""
    """Steps to trace with torch.profiler, first:last inclusive, e.g. 20:25; default: none."""
    ranks: str = "0"
    """Ranks to trace, e.g. 0,3; `all` for every rank."""
    peak_tflops: float = 0.0
    """Peak TFLOP/s of one device, for MFU; 0 = measured by matmuls at the start."""
    plan: Path | None = None
    """Output of `tapir plan --json` for this mesh; warns if the median step takes twice as long. On
    CPUs plan with --calibration."""

    def problems(self) -> list[str]:
        problems = []
        try:
            first, last = parse_steps(self.steps or "1:1")
            if not 1 <= first <= last:
                problems.append(
                    f"profile.steps={self.steps} must be a range of steps from 1 on; try 20:25"
                )
        except ValueError:
            problems.append(f"profile.steps={self.steps} must be first:last, e.g. 20:25")
        try:
            if any(rank < 0 for rank in parse_ranks(self.ranks)):
                problems.append(f"profile.ranks={self.ranks} must not be negative; try 0,3 or all")
        except ValueError:
            problems.append(f"profile.ranks={self.ranks} must be numbers, e.g. 0,3, or all")
        if not 0 <= self.peak_tflops < math.inf:
            problems.append("profile.peak_tflops must not be negative; 0 = measure it")
        return problems


def parse_steps(text: str) -> tuple[int, int]:
    """`20:25` -> (20, 25). Raises: ValueError."""
    first, last = map(int, text.split(":"))
    return first, last


def parse_ranks(text: str) -> list[int]:
    """`0,3` -> [0, 3], `all` -> []. Raises: ValueError."""
    return [] if text == "all" else [int(word) for word in text.split(",")]
