"""Image prompts: which tokens of a given picture are kept while the others are drawn.

Tokens are drawn in raster order, and each attends to earlier ones alone. All drawn tokens see kept
rows at the top, as in the paper. A kept token further down is seen by later tokens only: earlier
ones are drawn without it, so that seams may show there.
"""

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError, InputError
from data_pipeline.images.decode import decode_rgb
from generation.config import PromptConfig
from generation.mask_tokens import redrawn_tokens
from generation.sampling.sampler import Prompt

_RECTANGLE = re.compile(r"(\d*):(\d*),(\d*):(\d*)")


def kept_tokens(config: PromptConfig, grid: int, columns: int = 0) -> Tensor:
    """Mask of the tokens that a prompt keeps, (grid * columns,) bool; 0 columns: as many as rows.

    Raises: ConfigError if a part is outside the grid, or nothing is kept, or nothing drawn;
    InputError if the mask is not a picture.
    """
    shape = grid, columns or grid
    kept = torch.zeros(shape, dtype=torch.bool, device="cpu")
    if config.keep_rows > grid:
        raise ConfigError(f"--keep-rows {config.keep_rows}: the grid has {grid} rows of tokens")
    kept[: config.keep_rows] = True
    if config.mask is not None:
        kept |= ~_redrawn(config, shape)
    elif config.redraw and not (config.keep or config.keep_rows):
        kept[:] = True
    for text in config.keep:
        kept[_rectangle(text, shape)] = True
    for text in config.redraw:
        kept[_rectangle(text, shape)] = False
    if not kept.any() or kept.all():
        raise ConfigError(
            f"the image prompt keeps {'all' if kept.any() else 'none'} of the {_text(shape)} "
            "tokens: say what is kept by --keep-rows or --keep, or what is redrawn by --redraw or "
            "--mask"
        )
    return kept.flatten()


def prompt_of(codes: Tensor, config: PromptConfig, grid: int, columns: int = 0) -> Prompt:
    """Make a prompt of a picture's codes, (grid * columns,)."""
    return Prompt(codes=codes, kept=kept_tokens(config, grid, columns))


def _text(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _rectangle(text: str, shape: tuple[int, int]) -> tuple[slice, slice]:
    rows, columns = shape
    match = _RECTANGLE.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(
            f"{text!r} is not a rectangle of tokens; write ROWS,COLUMNS, each as first:end, e.g. "
            f"0:{rows // 2},: for the upper half"
        )
    top, bottom, left, right = (
        int(word) if word else default
        for word, default in zip(match.groups(), (0, rows, 0, columns), strict=True)
    )
    if not (top < bottom <= rows and left < right <= columns):
        raise ConfigError(f"{text!r} is not within the {_text(shape)} tokens, or is empty")
    return slice(top, bottom), slice(left, right)


def _redrawn(config: PromptConfig, shape: tuple[int, int]) -> Tensor:
    """Tokens under any bright pixel of a mask, (rows, columns) bool."""
    mask, image = _opened(config.mask), _opened(config.image)
    shapes = [x.shape[1] / x.shape[0] for x in (mask, image)]
    if abs(shapes[0] / shapes[1] - 1) > 0.02:
        raise InputError(
            f"{config.mask} has {mask.shape[1]}x{mask.shape[0]} pixels, {config.image} "
            f"{image.shape[1]}x{image.shape[0]}: both are cut to their middle squares, so make the "
            "mask of the picture's shape"
        )
    return torch.from_numpy(redrawn_tokens(mask, shape))


def _opened(path: Path | None) -> NDArray[np.uint8]:
    if path is None or not path.is_file():
        raise InputError(f"there is no picture {path}")
    return decode_rgb(path.read_bytes(), str(path))
