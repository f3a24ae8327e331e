"""What decoding remembers: keys and values of the text, shared by the candidates of a caption, and
of the image, for each candidate; and which of them a position reads.

The text of a caption is the same for all of its candidates, so that its keys and values are kept
once. A layer's mask allows an image position some tens of earlier ones: only these are read.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from models.masks import Kind, image_mask

_HERE = "cpu"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reads:
    """The image positions that each image position attends to, itself among them."""

    exact: list[Tensor]
    """For each position, the ones it reads, (w,) int64."""
    padded: Tensor
    """The same in one shape for compiled steps, (grid * grid, widest) int64."""
    bias: Tensor
    """(grid * grid, widest): 0 where `padded` is real, minus infinity elsewhere."""


@lru_cache(maxsize=16)
def reads_of(kind: Kind, grid: int, conv_kernel: int) -> Reads:
    """What a mask lets each position read."""
    exact = [row.nonzero().flatten() for row in image_mask(kind, grid, conv_kernel)]
    widest = max(len(row) for row in exact)
    padded = torch.zeros(len(exact), widest, dtype=torch.int64, device=_HERE)
    bias = torch.full((len(exact), widest), -torch.inf, device=_HERE)
    for i, row in enumerate(exact):
        padded[i, : len(row)] = row
        bias[i, : len(row)] = 0
    return Reads(exact=exact, padded=padded, bias=bias)


@dataclass(kw_only=True)
class BlockCache:
    """Keys and values of one block."""

    text_keys: Tensor
    """(captions, heads, text_length, D)."""
    text_values: Tensor
    keys: Tensor
    """(captions * each * heads, grid * grid, D)."""
    values: Tensor


@dataclass(kw_only=True)
class Lane:
    """Candidates that are decoded together: `each` of every caption, caption by caption."""

    captions: int
    each: int
    blocks: list[BlockCache] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Candidates in all."""
        return self.captions * self.each

    @property
    def bytes(self) -> int:
        """Memory of the caches."""
        tensors = [x for block in self.blocks for x in vars(block).values()]
        return sum(x.numel() * x.element_size() for x in tensors)
