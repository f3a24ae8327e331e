"""Pictures with the edges of photographs: dead leaves, occluding shaded discs of all sizes.

Their colours are all equally frequent, so that a codebook has many of them to tell apart.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.files.atomic import write_atomic
from core.keys import keyed_rng
from data_pipeline.images.crops import encode_png

DISCS = 24
LEAST, MOST = 4.0, 24.0
"""Radii in pixels; their density falls with the cube of the radius, as in photographs."""


def dead_leaves(seed: int, pixels: int = 32) -> NDArray[np.uint8]:
    """One picture, (pixels, pixels, 3).

    Source: Lee, Mumford and Huang, Occlusion models for natural images, 2001.
    """
    rng = keyed_rng(seed, "dead leaves")
    y, x = np.mgrid[:pixels, :pixels].astype(np.float32)
    image = np.tile(rng.random(3).astype(np.float32), (pixels, pixels, 1))
    for _ in range(DISCS):
        share = rng.random()
        radius = (LEAST**-2 + share * (MOST**-2 - LEAST**-2)) ** -0.5
        left, top = rng.uniform(-radius, pixels + radius, 2)
        inside = (x - left) ** 2 + (y - top) ** 2 < radius**2
        colour = rng.random(3)
        slope = rng.normal(0, 0.12, 2) / max(radius, 4.0)
        shade = slope[0] * (x - left) + slope[1] * (y - top)
        image[inside] = (colour[None, None] + shade[..., None])[inside]
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def write_leaves(folder: Path, count: int, pixels: int = 32) -> None:
    """Write numbered pictures with a caption each, as `tapir pack FOLDER` reads them."""
    for i in range(count):
        write_atomic(folder / f"{i:06d}.png", encode_png(dead_leaves(i, pixels)))
        write_atomic(folder / f"{i:06d}.txt", b"dead leaves")
