"""What a checkpoint is made of: slices of globally named tensors, and a sealed manifest.

    step-N/rank-00000.safetensors   the slices that rank 0 owned
    step-N/rank-00001.safetensors   ...
    step-N/manifest.json            written last: every slice, every file's sha256, its own digest

A slice is a flat, row-major range [start, stop) of a box of the global tensor; a box is a range
for each axis (the whole axis, unless tensor parallelism cut it).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

MANIFEST = "manifest.json"
VERSION = 1
KINDS = ("master", "exp_avg", "exp_avg_sq", "step")
"""fp32 weights, AdamW's moments, and the optimiser's step count. Compression adds `error@R`, the
error buffer of replica R, and `basis`, a warm-started Q."""


@dataclass(frozen=True, kw_only=True)
class StateSlice:
    """A part of one global tensor, owned by one rank."""

    name: str
    """Global parameter name."""
    kind: str
    """One of KINDS, `error@R` or `basis`."""
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    box: tuple[tuple[int, int], ...]
    """Range of each axis that the flat range lies in."""
    start: int
    """First element of the flat range inside of the box."""
    data: Tensor
    """The elements, flat, float32."""

    @property
    def stop(self) -> int:
        return self.start + self.data.numel()


class Reader(Protocol):
    """Gives out tensors of a checkpoint, whatever mesh wrote them."""

    def tensor(self, name: str, kind: str) -> Tensor:
        """The whole global tensor, float32; CheckpointError if parts are missing."""

    def kinds(self, name: str) -> list[str]:
        """What is stored of one parameter."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter."""
