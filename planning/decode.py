"""Pictures that are decoded ahead of the step: the cores, the host memory and the waits they take.

The constants are measured by `python -m bench pictures --step-ms 1000` on an AMD EPYC core.
"""

from dataclasses import dataclass
from typing import Any

from core.memory import size_text
from data_pipeline.streaming.ahead import depth_of
from models.config import ClipConfig, DVAEConfig
from planning.estimate.hardware import Hardware
from training.config import StageConfig

PICTURE_SECONDS = 2.5e-3
"""CPU of a core for one picture: a JPEG of 512x384 pixels is decoded and cropped to PIXELS."""
PIXELS = 256
HAND_OVER_SECONDS = 0.52e-3
"""CPU of a step's thread to take a ready batch; on a GPU the copy from pinned memory is queued."""
_FLOAT, _INTEGER = 4, 8
"""Bytes of a pixel's channel and of a token id."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What a rank's workers make, beside what its step takes."""

    pictures: int
    """Pictures of a rank's step."""
    workers: int
    """Threads of each rank (loader.workers)."""
    cores: float
    """Cores of the node for each rank's workers."""
    picture_seconds: float
    """CPU of one picture."""
    step_seconds: float
    """Of the step without waits."""
    ranks: int
    """Ranks of a node."""
    buffer_bytes: int
    """Host memory of a rank's batches: made ahead, and in use."""

    @property
    def needed_per_second(self) -> float:
        """Pictures that a rank's steps take, if they never wait."""
        return self.pictures / self.step_seconds

    @property
    def made_per_second(self) -> float:
        """Pictures that a rank's workers make, if they never wait."""
        return min(self.workers, self.cores) / self.picture_seconds

    @property
    def busy_cores(self) -> float:
        """Cores of a node that decode."""
        return self.ranks * min(self.needed_per_second, self.made_per_second) * self.picture_seconds

    @property
    def wait_seconds(self) -> float:
        """What a step waits: for the hand-over, and for pictures that are made too late."""
        late = self.pictures / self.made_per_second - self.step_seconds
        return HAND_OVER_SECONDS + max(0.0, late)

    @property
    def wait_fraction(self) -> float:
        """Part of the time that the step's thread waits for data."""
        return self.wait_seconds / (self.step_seconds + self.wait_seconds)

    def json(self) -> dict[str, float]:
        """For `tapir plan --json`."""
        return {
            "pictures": self.pictures,
            "workers": self.workers,
            "needed_per_second": self.needed_per_second,
            "made_per_second": self.made_per_second,
            "picture_seconds": self.picture_seconds,
            "hand_over_seconds": HAND_OVER_SECONDS,
            "busy_cores": self.busy_cores,
            "wait_seconds": self.wait_seconds,
            "wait_fraction": self.wait_fraction,
            "buffer_bytes": self.buffer_bytes,
        }

    def text(self) -> str:
        """For the terminal."""
        return (
            f"pictures: a rank's step takes {self.needed_per_second:,.0f} a second, its "
            f"{self.workers} loader.workers make {self.made_per_second:,.0f} "
            f"({1000 * self.picture_seconds:.3g} ms each, measured on a JPEG of 512x384); it waits "
            f"for {self.wait_fraction:.2%} of the time; {self.busy_cores:.1f} cores a node decode, "
            f"batches take {size_text(self.buffer_bytes)} of host memory a rank"
        )


def decoding(
    settings: StageConfig, pixels: int, step_seconds: float, hardware: Hardware
) -> Decoding:
    """How the workers of a stage keep up with a step of this length.

    A rank's own thread has one core of its share; the pixels of the source are assumed to grow with
    those of the crop.
    """
    ranks = min(settings.mesh.world, hardware.gpus_per_node)
    share = (hardware.cores or hardware.host_cores) / ranks
    return Decoding(
        pictures=settings.loop.global_batch_size // settings.mesh.data,
        workers=settings.loader.workers,
        cores=max(share - 1, 0.5 * share),
        picture_seconds=PICTURE_SECONDS * (pixels / PIXELS) ** 2,
        step_seconds=step_seconds,
        ranks=ranks,
        buffer_bytes=buffer_bytes(settings),
    )


def buffer_bytes(settings: StageConfig) -> int:
    """Host memory of a rank's batches: those that are made ahead, and the one in use."""
    replica = settings.loop.global_batch_size // settings.mesh.data
    depth = depth_of(settings.loader.workers, settings.engine.gradient_accumulation_steps)
    return (depth + 1) * replica * sample_bytes(settings)


def sample_bytes(settings: StageConfig) -> int:
    """Bytes of one sample's tensors in a batch."""
    model: Any = settings.model  # type: ignore[attr-defined]
    if isinstance(model, DVAEConfig):
        return _FLOAT * 3 * model.pixels**2 + _INTEGER
    if isinstance(model, ClipConfig):
        return _FLOAT * 3 * model.pixels**2 + _INTEGER * model.text_length
    return int(_INTEGER * (model.length))
