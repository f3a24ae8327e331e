"""What a decoding process does; imports no torch, as a loader's process would not either."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.support.leaves import dead_leaves
from core.keys import keyed_rng
from data_pipeline.images.crops import dvae_crop
from data_pipeline.images.decode import decode_rgb

HEIGHT, WIDTH, QUALITY = 384, 512, 90
"""A photograph of the web, as a JPEG."""


def jpeg(seed: int) -> bytes:
    """A JPEG of dead leaves."""
    file = io.BytesIO()
    Image.fromarray(dead_leaves(seed, WIDTH)[:HEIGHT]).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def crops(pictures: Sequence[bytes], pixels: int, step: int) -> NDArray[Any]:
    """The augmented pictures of a training step, (B, pixels, pixels, 3) uint8."""
    return np.stack(
        [
            dvae_crop(decode_rgb(data, "a picture"), pixels, keyed_rng(0, step, i, "augment"))
            for i, data in enumerate(pictures)
        ]
    )


def ready() -> bool:
    """Start a process of a pool."""
    return True
