"""Encoded images -> square RGB arrays."""

import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.tokenizers.config import Crop

EXTENSIONS = ("png", "jpg", "jpeg", "jpe", "jfif", "webp")


def square(image: NDArray[Any], pixels: int) -> NDArray[np.uint8]:
    """Crop the central square and resize it with area interpolation.

    Shapes: (height, width, 3) -> (pixels, pixels, 3).
    """
    height, width = image.shape[:2]
    side = min(height, width)
    return _resized(_cut(image, (height - side) // 2, (width - side) // 2, side), pixels)


def prior_crop(image: NDArray[Any], pixels: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Augmentation of the prior: a square near the centre, resized, then randomly cropped.

    Shapes: (height, width, 3), neither side below `pixels` -> (pixels, pixels, 3).
    Source: arXiv 2102.12092, listing 2, for 256 pixels. No flip: captions say left and right.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    excess = max(height, width) - side
    low = 3 * excess // 8
    offset = int(rng.integers(low, max(low + 1, 5 * excess // 8)))
    top, left = (offset, 0) if height > width else (0, offset)
    middle = _cut(image, top, left, side)
    target = int(rng.integers(pixels, min(side, 9 * pixels // 8) + 1))
    top, left = (int(place) for place in rng.integers(0, target - pixels + 1, 2))
    return np.ascontiguousarray(_cut(_resized(middle, target), top, left, pixels))


def tokenizer_crop(
    image: NDArray[Any], pixels: int, crop: Crop, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """The crop that an image tokenizer wants, (height, width, 3) -> (pixels, pixels, 3)."""
    return square(image, pixels) if crop == "center" else prior_crop(image, pixels, rng)


def dvae_crop(image: NDArray[Any], pixels: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Augmentation of the dVAE: a random square, resized, randomly cropped and flipped.

    Shapes: (height, width, 3) -> (pixels, pixels, 3). A picture whose shorter side is below
    `pixels` is resized by `square` instead.
    Source: arXiv 2102.12092, listing 1, for 256 pixels.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    if side < pixels:
        return square(image, pixels)
    top, left = (int(rng.integers(0, size - side + 1)) for size in (height, width))
    target = int(rng.integers(min(side, 9 * pixels // 8), min(side, 3 * pixels // 2) + 1))
    whole = _resized(_cut(image, top, left, side), target)
    top, left = (int(place) for place in rng.integers(0, target - pixels + 1, 2))
    cut = _cut(whole, top, left, pixels)
    return np.ascontiguousarray(cut[:, ::-1] if rng.integers(2) else cut)


def encode_png(image: NDArray[Any]) -> bytes:
    """Encode (height, width, 3) uint8 RGB as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _cut(image: NDArray[Any], top: int, left: int, side: int) -> NDArray[Any]:
    return image[top : top + side, left : left + side]


def _resized(image: NDArray[Any], pixels: int) -> NDArray[np.uint8]:
    """Resize a square with area interpolation."""
    if len(image) == pixels:
        return np.ascontiguousarray(image)
    return np.asarray(cv2.resize(image, (pixels, pixels), interpolation=cv2.INTER_AREA), np.uint8)
