"""Keyed weights of any tokenizer network, by its own parameter names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.initialization import generator

TABLES = ("embedding.weight", "embed.weight")
"""Codebooks: from N(0, 1)."""


def keyed_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep the scale of states, so that many codes are used; each by its name."""
    return {name: _keyed(name, shape, seed) for name, shape in shapes.items()}


def _keyed(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    drawn = torch.randn(shape, generator=generator(seed, name, "test"), device="cpu")
    if name.endswith(TABLES):
        return drawn
    if len(shape) > 1:
        return drawn / drawn[0].numel() ** 0.5
    return 0.1 * drawn + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def keyed_pictures(count: int, pixels: int, seed: int = 0) -> Tensor:
    """(count, 3, pixels, pixels) in [0, 1]."""
    shape = (count, 3, pixels, pixels)
    return torch.rand(shape, generator=generator(seed, "pictures", "test"), device="cpu")
