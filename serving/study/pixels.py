"""Pictures of a study as arrays; imports no torch."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.images.decode import decode_rgb

LONGEST_SIDE = 1024
"""Larger pictures are reduced: raters' browsers load two for each caption."""
Rgb = NDArray[np.uint8]


class Encoded(NamedTuple):
    """A picture as it is stored, and where, for messages."""

    image: bytes
    where: str


def decoded(picture: Encoded, most: int = LONGEST_SIDE) -> Rgb:
    """Decode a picture, reduced to at most `most` pixels a side.

    Shapes: returns (height, width, 3).
    Raises: InputError if it does not decode.
    """
    pixels = decode_rgb(picture.image, picture.where)
    height, width = pixels.shape[:2]
    scale = most / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
