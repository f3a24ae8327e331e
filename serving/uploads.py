"""Uploaded pictures and masks: limited by their headers, then decoded; imports no torch."""

import asyncio
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from core.errors import InputError
from data_pipeline.images.crops import square
from data_pipeline.images.decode import decode_rgb
from generation.mask_tokens import redrawn_tokens
from serving.ranks.group import JobError
from serving.ranks.messages import ModelFacts
from serving.requests import bad_request

_SKEW = 0.02
"""By which the shapes of a picture and its mask may differ."""


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """An uploaded picture as a model reads it."""

    pixels: bytes
    """RGB, (S, S, 3) uint8."""
    kept: tuple[int, ...]
    """0 or 1 for each token."""


class Uploads:
    """Decodes uploads one at a time: a picture at the limit takes 64 MB meanwhile."""

    def __init__(self, megapixels: float) -> None:
        self._megapixels, self._one = megapixels, asyncio.Lock()

    async def prompt(self, image: bytes, mask: bytes | None, facts: ModelFacts) -> ImagePrompt:
        """Decode a picture and its mask; tokens under a transparent pixel of it are redrawn.

        Without a mask the picture's own transparency is the mask.
        Raises: JobError if they are no pictures, too large, or keep all or nothing.
        """
        async with self._one:
            try:
                return await asyncio.to_thread(_image_prompt, image, mask, facts, self._megapixels)
            except InputError as error:
                raise bad_request(str(error)) from None


def _image_prompt(
    image: bytes, mask: bytes | None, facts: ModelFacts, megapixels: float
) -> ImagePrompt:
    for name, data in (("image", image), ("mask", mask)):
        if data is not None:
            _check_size(name, data, megapixels)
    picture = decode_rgb(image, "image")
    clear = _transparency("image" if mask is None else "mask", image if mask is None else mask)
    shapes = [x.shape[1] / x.shape[0] for x in (clear, picture)]
    if abs(shapes[0] / shapes[1] - 1) > _SKEW:
        raise bad_request(
            f"mask: it has {clear.shape[1]}x{clear.shape[0]} pixels, the image "
            f"{picture.shape[1]}x{picture.shape[0]}; make them equal in shape"
        )
    redrawn = redrawn_tokens(np.repeat(clear[:, :, None], 3, 2), (facts.rows, facts.columns))
    if redrawn.all() or not redrawn.any():
        raise bad_request(
            f"mask: it redraws {'all' if redrawn.any() else 'none'} of the picture; make the part "
            "that is to be redrawn transparent (alpha 0), and the rest opaque"
        )
    return ImagePrompt(
        pixels=square(picture, facts.pixels).tobytes(),
        kept=tuple(int(not x) for x in redrawn.flatten()),
    )


def _check_size(name: str, data: bytes, megapixels: float) -> None:
    """Refuse a picture by the size that its header states, before its pixels are decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:  # beyond Pillow's own limit of 179 million
        width = height = 2**16
    except Exception as error:  # Pillow raises nearly anything for damaged files
        raise bad_request(f"{name}: it is no readable PNG, JPEG or WebP") from error
    if width * height > megapixels * 1e6:
        message = f"{name}: it has more than {megapixels:g} million pixels; make it smaller"
        raise JobError(413, message, "too_large")


def _transparency(name: str, data: bytes) -> NDArray[np.uint8]:
    """How transparent each pixel is, (H, W): 255 is fully.

    Raises: JobError if the picture has no transparency.
    """
    file: Any = io.BytesIO(data)
    try:
        opened = PngImageFile(file) if data[:4] == b"\x89PNG" else WebPImageFile(file)
        with opened as picture:
            if not picture.has_transparency_data:
                raise bad_request(
                    f"{name}: it has no transparent pixels; send a PNG mask whose alpha is 0 where "
                    "the picture is to be redrawn"
                )
            ImageOps.exif_transpose(picture, in_place=True)  # as the picture itself is decoded
            alpha = np.asarray(picture.convert("RGBA"))[:, :, 3]
    except JobError:
        raise
    except Exception as error:  # as above
        raise bad_request(f"{name}: it is no readable PNG or WebP") from error
    return 255 - alpha
