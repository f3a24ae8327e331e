"""The masks for FlexAttention on GPUs, with column layers in transposed order.

In raster order a column mask touches nearly every block of 128 keys; with the image transposed,
each column is contiguous, and most blocks are empty. Has not run on a GPU yet; CPU tests check that
the masks equal the dense ones, and that Inductor compiles each of them.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.attention.masks import Kind, window

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BLOCK = 128


def mask_mod(kind: Kind, text: int, grid: int, conv_kernel: int, columns: int = 0) -> MaskMod:
    """`masks.full_mask` as a FlexAttention mask_mod; column masks use the transposed image."""
    width = columns or grid
    up, aside = window(grid, conv_kernel, width)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        offset = query - key
        if kind == "row":
            visible = offset <= width
        elif kind == "column":
            visible = (query - text) // grid == (key - text) // grid
        else:  # rows above, and columns to both sides, with wrap-around
            rows = (offset + aside) // width
            left = offset - rows * width
            visible = (rows <= up) & (left <= aside)
            # where 2 * aside = width; not in place: Inductor refuses to write to `visible`
            visible = visible | ((rows - 1 <= up) & (left + width <= aside))
        return (offset >= 0) & ((key < text) | ((query >= text) & visible))

    return allowed


@lru_cache(maxsize=16)
def block_mask(
    kind: Kind, text: int, grid: int, conv_kernel: int, device: str, columns: int = 0
) -> BlockMask:
    """The 128 x 128 blocks that contain unmasked pairs."""
    length = text + grid * (columns or grid)
    allowed = mask_mod(kind, text, grid, conv_kernel, columns)
    return create_block_mask(allowed, None, None, length, length, device=device, BLOCK_SIZE=BLOCK)


def flexible_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: Kind,
    text: int,
    grid: int,
    conv_kernel: int,
    columns: int = 0,
) -> Tensor:
    """Attention of the whole stream by FlexAttention's compiled kernel.

    Shapes: (B, heads, text + grid * columns, D) each -> the same.
    """
    mask = block_mask(kind, text, grid, conv_kernel, str(q.device), columns)
    if kind != "column":
        out: Tensor = _compiled()(q, k, v, block_mask=mask)
        return out
    width = columns or grid
    q, k, v = (transposed(x, text, grid, width) for x in (q, k, v))
    return transposed(_compiled()(q, k, v, block_mask=mask), text, width, grid)


def transposed(x: Tensor, text: int, grid: int, columns: int = 0) -> Tensor:
    """Swap rows and columns of the image positions; its inverse has them swapped."""
    image = x[:, :, text:].unflatten(2, (grid, columns or grid)).transpose(2, 3).flatten(2, 3)
    return torch.cat([x[:, :, :text], image], dim=2)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
