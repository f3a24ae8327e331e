"""Settings of the always-on profile and of traces, and its categories of time; no torch."""

import math
from dataclasses import dataclass
from pathlib import Path

COMPUTE = "compute"
"""Forward, backward and other work of the engine, without waits for other ranks."""
TENSOR = "tensor"
"""Collectives of tensor parallelism."""
PIPELINE = "pipeline"
"""Transfers between pipeline stages; waits beyond the transfer are BUBBLE."""
DATA = "data"
"""Gradient reduction, ZeRO's gathers and other operations between replicas, including waits for a
slower replica."""
BUBBLE = "bubble"
"""Waits of a pipeline stage for other stages. An operation between stages (a send, a receive, or a
collective over all ranks of a pipeline) is split into its transfer and the bubble. The transfer
time is the shortest duration on this rank in this run of an operation with the same group, name and
size. At the end of a step the early stages wait in the reduction of the gradient norm; that is
bubble, too."""
DATA_WAIT = "data_wait"
"""Waits for records, and their conversion to tensors in the training loop."""
OPTIMIZER = "optimizer"
"""The optimiser's update of weights and moments."""
CHECKPOINT = "checkpoint"
"""Time for which a save blocks training: all of it unless it is written in the background."""
VALIDATION = "validation"
"""Validations; a plan has none."""
OTHER = "other"
"""Python outside of the engine: reports, guards, averages."""
CATEGORIES = (
    COMPUTE,
    TENSOR,
    PIPELINE,
    DATA,
    BUBBLE,
    DATA_WAIT,
    OPTIMIZER,
    CHECKPOINT,
    VALIDATION,
    OTHER,
)
OWN = (COMPUTE, DATA_WAIT, OPTIMIZER, OTHER)
"""A rank's own work; a rank that is slow here delays the others."""
UNDIVIDED = (DATA_WAIT, CHECKPOINT, VALIDATION)
"""Categories that include all nested work, also collectives."""
OF_GROUP = {
    **dict.fromkeys(("pipeline", "ends"), PIPELINE),
    **dict.fromkeys(("data", "machine", "between"), DATA),
    "tensor": TENSOR,
}
"""Ledger group -> category of its operations; other groups are OTHER."""


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
