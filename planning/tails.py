"""What a run does beside its steps: validation, checkpoints, profile and trackers."""

from dataclasses import dataclass

from planning.estimate.hardware import GB, Hardware
from training.config import PriorTrain

FORWARD = 1 / 3
"""A validation's pass over a step's: forward alone."""
STAGED = 20 * GB
"""Bytes a second that a GPU copies to pinned host memory: 16 lanes of PCIe 4 have 32 GB/s. Training
waits for the copy; files are written in the background. On CPUs memory's bandwidth is taken."""
BOOKED = 3e-6
"""Seconds of a border of the profile's clock (`python -m bench tails`)."""
BORDERS = 400
"""Borders of a step: phases, and collectives, which end at two."""
ROW = 2e-3
"""Seconds of a row of metrics.jsonl, handed to the trackers' queues (`python -m bench tails`)."""


@dataclass(frozen=True, kw_only=True)
class Tails:
    """Seconds a step, on average over a run."""

    validation: float
    checkpoints: float
    profile: float
    trackers: float
    step: float

    @property
    def share(self) -> float:
        """All of them as a fraction of a step."""
        return (self.validation + self.checkpoints + self.profile + self.trackers) / self.step

    def json(self) -> dict[str, float]:
        """The seconds a step, and the fraction."""
        return {**{k: v for k, v in vars(self).items() if k != "step"}, "share": self.share}

    def text(self) -> str:
        """A sentence."""
        parts = ", ".join(f"{k} {v / self.step:.3%}" for k, v in vars(self).items() if k != "step")
        return f"beside the steps of the first one: {self.share:.2%} of the time ({parts})"


def tails(settings: PriorTrain, seconds: float, stored: int, hardware: Hardware) -> Tails:
    """Average seconds a step; `stored`: bytes of a checkpoint, over all ranks."""
    loop = settings.loop
    samples = loop.validation_samples / loop.global_batch_size
    every = loop.validate_every or loop.steps
    rate = hardware.bandwidth if hardware.cores else STAGED
    ranks = 1 if hardware.cores else settings.mesh.world
    return Tails(
        validation=FORWARD * samples * seconds / every,
        checkpoints=stored / ranks / rate / settings.checkpoint.every,
        profile=BORDERS * BOOKED,
        trackers=ROW / loop.log_every,
        step=seconds,
    )
