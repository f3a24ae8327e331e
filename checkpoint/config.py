"""Settings of checkpoints; imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from core.config import place_problems

ErrorBuffers = Literal["auto", "own", "mean"]
MOST_OWN = 8
"""Replicas up to which `auto` stores an error buffer for each."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and where checkpoints are written, and which are kept."""

    every: int = 200
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every_hours: float = 0.0
    """Also keep one checkpoint per this many hours; 0 = none."""
    best: bool = False
    """Also keep the checkpoint with the lowest validation loss, among those of validated steps."""
    to: str = ""
    """s3://bucket/prefix or a folder; default: `checkpoints` in the run folder."""
    async_save: bool = True
    """Write in the background; needs host memory for a copy of this rank's state."""
    errors: ErrorBuffers = "auto"
    """Error buffers of compression: own = one a replica, resumes bit for bit on the same mesh; mean
    = their mean, sharded: resumes equally up to rounding on any mesh, and the size does not grow
    with the replicas; auto = own up to 8 replicas, else mean."""
    shard_gigabytes: float = 5.0
    """A larger finished model is written by all ranks, a file each; 0 = always."""

    def problems(self) -> list[str]:
        problems = []
        if min(self.every, self.keep) < 1:
            problems.append("checkpoint.every and checkpoint.keep must be at least 1")
        if not 0 <= self.keep_every_hours < math.inf:
            problems.append("checkpoint.keep_every_hours must not be negative; 0 = none")
        if not 0 <= self.shard_gigabytes < math.inf:
            problems.append("checkpoint.shard_gigabytes must not be negative; the hub's is 5")
        return problems + place_problems(self.to, "checkpoint.to")


def averages_errors(errors: ErrorBuffers, replicas: int) -> bool:
    """True if a checkpoint holds the mean of the replicas' error buffers instead of each."""
    return errors == "mean" or (errors == "auto" and replicas > MOST_OWN)
