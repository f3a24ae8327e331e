"""Settings of `tapir doctor`; imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.storage.mixture import mixture_problems


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to check, and what the run needs."""

    out: Path = Path("runs")
    """Run folder; all ranks must see the same one. Probe files in it are removed."""
    data: str = ""
    """s3://bucket/prefix or a folder whose access rights and speed are tested, or a mixture of
    some, A:0.7,B:0.3; empty = none."""
    rights: Literal["read", "write"] = "write"
    """Rights needed on --data: read only, or also writes, deletes and conditional puts."""
    node: bool = False
    """Only the quick checks of one node, without torch; submitted jobs run this first."""
    quick: bool = False
    """Leave out torch, devices and the burn-in; ranks still meet and are compared."""
    ranks: int = 0
    """Ranks to spawn here, if no launcher has started any."""
    scheduler: Literal["none", "slurm", "kubernetes"] = "none"
    """The scheduler that must answer here."""
    memory: float = 0.0
    """GB of free memory that the run needs on each node."""
    disk: float = 1.0
    """GB that must be free in the run folder."""
    shared_memory: float = 0.25
    """GB that /dev/shm must have; containers often come with 0.06."""
    files: int = 1024
    """Open files that a process must be allowed."""
    gpus: int = 0
    """GPUs that each node must have."""
    wait: float = 60.0
    """Seconds within which all ranks must have met."""
    seconds: float = 1.0
    """Seconds of matmuls in the burn-in."""

    def problems(self) -> list[str]:
        problems: list[str] = []
        problems += mixture_problems(self.data, "--data")
        needs = (self.memory, self.disk, self.shared_memory)
        if not all(0 <= each < math.inf for each in needs):
            problems.append("--memory, --disk and --shared-memory are GB and must not be negative")
        if min(self.files, self.gpus, self.ranks) < 0:
            problems.append("--files, --gpus and --ranks must not be negative")
        if not all(0 < each < math.inf for each in (self.wait, self.seconds)):
            problems.append("--wait and --seconds must be positive numbers")
        if self.node and self.ranks:
            problems.append("--node checks one node: leave out --ranks")
        return problems
