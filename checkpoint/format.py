"""The checkpoint format: slices of globally named tensors, and a sealed manifest.

    step-N/rank-00000.safetensors   the slices that rank 0 owned
    step-N/rank-00001.safetensors   ...
    step-N/manifest.json            written last: every slice, every file's sha256, its own digest

A slice is a flat, row-major range [start, stop) of the global tensor: tensor parallelism cuts
rows, ZeRO cuts flat ranges. It is stored in the type that it has in memory.
"""

import re
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

MANIFEST = "manifest.json"
VERSION, MEANS_VERSION = 2, 3
"""Version 3 holds means of error buffers, which readers of version 2 would ignore."""
MEAN_ERROR = "error"
"""Kind of the mean of all replicas' error buffers."""
KINDS = ("master", "exp_avg", "exp_avg_sq", "step")
"""fp32 weights, AdamW's moments, and the optimiser's step count. Compression adds `error@R`, the
error buffer of replica R, or `error`, the mean of all, and `basis`, a warm-started Q; fp16 adds
`scale`, EMA adds `ema`.
"""


_RANK_FILE = re.compile(r"rank-(\d+)\.safetensors")


def rank_file(rank: int) -> str:
    """The file of a rank's slices, in the folder of its checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def number_of(name: str) -> int:
    """The rank of a file; -1 for another file."""
    match = _RANK_FILE.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else -1


@dataclass(frozen=True, kw_only=True)
class StateSlice:
    """A part of one global tensor, owned by one rank."""

    name: str
    """Global parameter name."""
    kind: str
    """One of KINDS, or an added kind."""
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    start: int
    """First element of the flat global tensor."""
    data: Tensor
    """The elements, flat."""

    @property
    def stop(self) -> int:
        return self.start + self.data.numel()


class Reader(Protocol):
    """Reads tensors of a checkpoint, whatever mesh wrote them."""

    def tensor(self, name: str, kind: str) -> Tensor:
        """The whole global tensor, float32; CheckpointError if parts are missing."""

    def flat(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat global tensor, float32; reads no others."""

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """The global tensor's shape."""

    def kinds(self, name: str) -> list[str]:
        """Kinds that are stored for one parameter."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter."""
