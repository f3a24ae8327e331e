"""Encoded images -> square RGB arrays, with caps that hold before anything is decoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from core.errors import InputError

MOST_PIXELS = 24_000_000
"""A 24-megapixel camera's; four bytes each are held while a picture is decoded."""
FORMATS = ("PNG", "JPEG", "WEBP")
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_LARGE = 4_000_000
"""Pixels from which on one picture is decoded at a time: 4 bytes each."""
_ONE_LARGE = Lock()


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What `tapir pack` must know of a picture."""

    width: int
    height: int
    look: int
    """A 64-bit perceptual hash: which of two neighbouring areas is brighter."""


def inspect(data: bytes, where: str) -> Inspected:
    """Decode a picture once, to see that it can be.

    Raises: InputError for anything that is no whole still PNG, JPEG or WebP of a sane size.
    """
    with _opened(data, where) as image:
        image.load()
        way = Image.Resampling.BOX if image.mode in ("RGB", "L") else Image.Resampling.NEAREST
        grey = image.resize((72, 64), way).convert("L").resize((9, 8), Image.Resampling.BOX)
        rows = np.asarray(grey, np.int16)
        bits = np.packbits(rows[:, 1:] > rows[:, :-1])
        look = int.from_bytes(bits.tobytes(), "big")
        return Inspected(width=image.width, height=image.height, look=look)


def decode_rgb(data: bytes, where: str) -> NDArray[np.uint8]:
    """Decode one image; transparency becomes white, EXIF rotation is applied, 16 bits become 8.

    Shapes: returns (height, width, 3) uint8.
    Raises: InputError for anything that is no whole still PNG, JPEG or WebP of a sane size.
    """
    with _opened(data, where) as image:
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:
            colours = upright.convert("RGBA")
            white = Image.new("RGBA", colours.size, "white")
            return np.asarray(Image.alpha_composite(white, colours).convert("RGB"))
        if upright.mode.startswith("I"):  # 16-bit grey, which PIL would clip
            grey = (np.asarray(upright, np.int32) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, 2)
        return np.asarray(upright.convert("RGB"))


@contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > MOST_PIXELS:
                raise InputError(
                    f"{where} has {image.width}x{image.height} pixels; the limit is {MOST_PIXELS}"
                )
            if getattr(image, "is_animated", False):
                raise InputError(f"{where} is an animation; give a still picture")
            if pixels < _LARGE:
                yield image
                return
            with _ONE_LARGE:
                yield image
    except UnidentifiedImageError as error:
        raise InputError(f"{where} is no PNG, JPEG or WebP, or its start is damaged") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{where} is no readable PNG, JPEG or WebP image: {error}") from error


def square(image: NDArray[Any], pixels: int) -> NDArray[np.uint8]:
    """Crop the middle square and resize it by area.

    Shapes: (height, width, 3) -> (pixels, pixels, 3).
    """
    height, width = image.shape[:2]
    side = min(height, width)
    return _resized(_cut(image, (height - side) // 2, (width - side) // 2, side), pixels)


def prior_crop(image: NDArray[Any], pixels: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The crop that the prior sees: a square near the middle, resized, and cut at random.

    Shapes: (height, width, 3), neither side below `pixels` -> (pixels, pixels, 3).
    Source: arXiv 2102.12092, listing 2, for 256 pixels; no flip, captions speak of left and right.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    excess = max(height, width) - side
    low, high = 3 * excess // 8, max(3 * excess // 8 + 1, 5 * excess // 8)
    offset = int(rng.integers(low, high))
    middle = _cut(image, offset if height > width else 0, offset if width > height else 0, side)
    target = int(rng.integers(pixels, min(side, 9 * pixels // 8) + 1))
    top, left = (int(place) for place in rng.integers(0, target - pixels + 1, 2))
    return np.ascontiguousarray(_cut(_resized(middle, target), top, left, pixels))


def dvae_crop(image: NDArray[Any], pixels: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The view of a picture that the dVAE trains on: a random square, resized, cut and flipped.

    Shapes: (height, width, 3) -> (pixels, pixels, 3); a picture whose shorter side is below
    `pixels` is only squared.
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
    Image.fromarray(np.asarray(image, np.uint8)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _cut(image: NDArray[Any], top: int, left: int, side: int) -> NDArray[Any]:
    return image[top : top + side, left : left + side]


def _resized(image: NDArray[Any], pixels: int) -> NDArray[np.uint8]:
    """Resize a square by area."""
    if len(image) == pixels:
        return np.ascontiguousarray(image)
    return np.asarray(cv2.resize(image, (pixels, pixels), interpolation=cv2.INTER_AREA), np.uint8)
