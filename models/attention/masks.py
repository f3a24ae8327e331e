"""Which earlier positions each position attends to: row, column and convolutional masks.

Text attends to earlier text; an image position attends to all text, and to earlier image
positions by its layer's mask. Source: arXiv 2102.12092, section 2.2 and appendix B.1.
"""

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["row", "column", "conv"]
_HERE = "cpu"
"""Masks are built on the CPU even if the model is on the meta device."""


def layer_kind(layer: int, layers: int) -> Kind:
    """The mask of layer 1..layers: column if (i - 2) mod 4 == 0, conv in the last, else row."""
    if layer == layers:
        return "conv"
    return "column" if layer % 4 == 2 else "row"


def image_mask(kind: Kind, grid: int, conv_kernel: int = 11, columns: int = 0) -> Tensor:
    """Image-to-image part of a mask, True where attention is allowed.

    Shapes: returns (grid * columns, grid * columns) bool; rows are queries. 0 columns: as many as
    rows (`grid`).
    """
    width = columns or grid
    positions = torch.arange(grid * width, device=_HERE)
    offset = positions[:, None] - positions[None, :]
    causal = offset >= 0
    if kind == "row":
        return causal & (offset <= width)
    if kind == "column":
        return causal & (offset % width == 0)
    up, aside = window(grid, conv_kernel, width)
    rows = torch.arange(up + 1, device=_HERE)
    around = torch.arange(-aside, aside + 1, device=_HERE)
    reach = torch.cartesian_prod(width * rows, around).sum(1)
    return causal & torch.isin(offset, reach[reach >= 0])


def window(grid: int, conv_kernel: int, width: int) -> tuple[int, int]:
    """Rows above, and columns to each side, that the convolutional mask reaches."""
    return min(conv_kernel // 2, grid // 2), min(conv_kernel // 2, width // 2)


def full_mask(kind: Kind, text: int, grid: int, conv_kernel: int = 11, columns: int = 0) -> Tensor:
    """The mask of the whole stream of `text` + grid * columns positions.

    Shapes: returns (length, length) bool; rows are queries.
    """
    length = text + grid * (columns or grid)
    mask = torch.ones(length, length, dtype=torch.bool, device=_HERE).tril()
    mask[text:, text:] = image_mask(kind, grid, conv_kernel, columns)
    return mask
