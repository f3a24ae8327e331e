"""Encoded images -> square RGB arrays, with caps that hold before anything is decoded."""

import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from core.errors import InputError

MOST_PIXELS = 40_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
EXTENSIONS = ("png", "jpg", "jpeg", "webp")


def decode_rgb(data: bytes, where: str) -> NDArray[np.uint8]:
    """Decode one image; transparency becomes white, EXIF rotation is applied.

    Shapes: returns (height, width, 3) uint8.
    Raises: InputError for anything that is no whole PNG, JPEG or WebP of a sane size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(
                    f"{where} has {image.width}x{image.height} pixels; the limit is {MOST_PIXELS}"
                )
            upright = ImageOps.exif_transpose(image)
            if "A" in upright.getbands() or "transparency" in upright.info:
                colours = upright.convert("RGBA")
                white = Image.new("RGBA", colours.size, "white")
                return np.asarray(Image.alpha_composite(white, colours).convert("RGB"))
            return np.asarray(upright.convert("RGB"))
    except UnidentifiedImageError as error:
        raise InputError(f"{where} is no PNG, JPEG or WebP, or its start is damaged") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{where} is no readable PNG, JPEG or WebP image: {error}") from error


def square(image: NDArray[Any], pixels: int) -> NDArray[np.uint8]:
    """Crop the middle square and resize it by area.

    Shapes: (height, width, 3) -> (pixels, pixels, 3).
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = image[top : top + side, left : left + side]
    if side == pixels:
        return np.ascontiguousarray(middle)
    return np.asarray(cv2.resize(middle, (pixels, pixels), interpolation=cv2.INTER_AREA), np.uint8)


def encode_png(image: NDArray[Any]) -> bytes:
    """Encode (height, width, 3) uint8 RGB as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
