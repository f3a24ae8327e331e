"""An image tokenizer of a third party: each patch becomes the nearest colour of a palette.

    pip install examples/image_tokenizer
    tapir import colours.json runs/palette --from palette --pixels 32
    tapir tokenize runs/raw runs/tokens --dvae runs/palette

colours.json: {"patch": [4, 4], "colours": [[255, 0, 0], ...]}, a patch's height and width in pixels
and colours of 0 to 255.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError
from models.tokenizers.config import Crop, ReadOptions
from models.tokenizers.protocol import TokenizerNetwork
from models.tokenizers.registry import TokenizerKind


@dataclass(frozen=True, kw_only=True)
class PaletteConfig:
    """Sizes of a palette tokenizer."""

    pixels: int
    """Side of the square pictures, in pixels."""
    height: int
    """Height of a patch, in pixels."""
    width: int
    """Width of a patch, in pixels."""
    codebook: int
    """Colours of the palette."""
    crop: Crop = "center"
    """How pictures are cropped to squares."""

    @property
    def rows(self) -> int:
        """Rows of the token grid."""
        return self.pixels // self.height

    @property
    def columns(self) -> int:
        """Columns of the token grid."""
        return self.pixels // self.width

    def problems(self) -> list[str]:
        """All problems of the sizes, each with its fix."""
        patches = f"patches of {self.height} x {self.width} pixels"
        if min(self.height, self.width) < 1:
            return [f"{patches} hold nothing; both sides must be at least 1"]
        step = lcm(self.height, self.width)
        if self.pixels > 0 and self.pixels % step == 0:
            return []
        fitting = max(step, self.pixels // step * step)
        return [f"{patches} do not tile pictures of {self.pixels}; give --pixels {fitting}"]


class Palette(TokenizerNetwork):
    """The palette, as a network's only weight."""

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__()
        self.config = config
        self.colours = nn.Parameter(torch.zeros(config.codebook, 3))

    def encode(self, pictures: Tensor) -> Tensor:
        means = F.avg_pool2d(pictures, (self.config.height, self.config.width))
        return torch.cdist(means.flatten(2).transpose(1, 2), self.colours).argmin(2)

    def decode(self, codes: Tensor) -> Tensor:
        grid = self.colours[codes].transpose(1, 2).unflatten(2, (self.config.rows, -1))
        whole = grid.repeat_interleave(self.config.height, 2)
        return whole.repeat_interleave(self.config.width, 3)


def matches(path: Path) -> bool:
    """True if a file is a palette."""
    return path.is_file() and path.suffix == ".json" and b'"colours"' in path.read_bytes()


def read(path: Path, options: ReadOptions) -> tuple[PaletteConfig, Mapping[str, Tensor]]:
    """Sizes and weights of a palette's file.

    Raises: InputError if it is none.
    """
    try:
        body = json.loads(path.read_bytes())
        (height, width), colours = body["patch"], torch.tensor(body["colours"]) / 255
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no palette ({error}); see palette_tokenizer.py") from error
    config = PaletteConfig(
        pixels=options.pixels, height=height, width=width, codebook=len(colours), crop=options.crop
    )
    return config, {"colours": colours}


KIND = TokenizerKind(config=PaletteConfig, build=Palette, matches=matches, read=read)
