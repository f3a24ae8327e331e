"""Work in parts of one size, so that rounding does not depend on how many rows there are."""

from collections.abc import Callable

import torch
from torch import Tensor

PIXELS_TOGETHER = 2**14
"""Of 32x32 pixels 16 pictures, from 128x128 on one."""


def in_parts(work: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """Apply `work` to parts of exactly `size` rows, the last one filled up with zeros.

    A matmul or convolution of other sizes may add in another order: a picture that is decoded or
    ranked beside others would differ from the same one by itself in the last bit.
    """
    found = []
    for part in rows.split(size):
        filled = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
        found.append(work(filled)[: len(part)])
    return torch.cat(found)


def pictures_together(side: int) -> int:
    """Pictures of this side, in pixels, that go through a network at once."""
    return max(1, PIXELS_TOGETHER // side**2)
