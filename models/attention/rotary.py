"""Two-dimensional rotary positions of the queries and keys of the whole stream.

Text position i turns by (i, i), the image's row r and column c by (text_length + r, text_length +
c), so that attention sees distances in rows and columns, and text is in one dimension. Source:
arXiv 2104.09864; the coordinates as in arXiv 2409.12191, section 2.1.
"""

from functools import lru_cache

import torch
from torch import Tensor

BASE = 10_000.0
"""The slowest pair of channels turns about this many times slower than the fastest."""
_HERE = "cpu"
"""Tables are built on the CPU even if the model is on the meta device."""
Turns = tuple[Tensor, Tensor]
"""Cosines and sines, (positions, 1, channels of a head / 2): equal for all heads."""


@lru_cache(maxsize=16)
def rotary_table(text: int, rows: int, columns: int, head: int) -> Turns:
    """Turns of all positions, on the CPU.

    Shapes: `head` is the channels of a head, a multiple of 4; the first half of its pairs turns by
    the row, the second by the column.
    """
    text_positions = torch.arange(text, device=_HERE)
    across, down = torch.arange(columns, device=_HERE), torch.arange(rows, device=_HERE)
    by_row = torch.cat([text_positions, text + down.repeat_interleave(columns)])
    by_column = torch.cat([text_positions, text + across.repeat(rows)])
    pairs = head // 4
    rates = BASE ** (-torch.arange(pairs, dtype=torch.float64, device=_HERE) / pairs)
    angles = torch.cat([by_row[:, None] * rates, by_column[:, None] * rates], 1)[:, None]
    return angles.cos().float(), angles.sin().float()


@lru_cache(maxsize=16)
def rotary_table_on(device: torch.device, text: int, rows: int, columns: int, head: int) -> Turns:
    """`rotary_table` on a device, copied there once for all layers."""
    cosines, sines = rotary_table(text, rows, columns, head)
    return cosines.to(device), sines.to(device)


def rotate(x: Tensor, turns: Turns) -> Tensor:
    """Turn pairs of channels, i and i + D / 2, in fp32.

    Shapes: x (..., positions, heads, D) -> the same, in x's type.
    """
    cosines, sines = turns
    first, second = x.chunk(2, -1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return torch.cat(turned, -1).to(x.dtype)
