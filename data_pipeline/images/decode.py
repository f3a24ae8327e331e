"""The only picture decoder: `pack` accepts the pictures that it decodes, and all stages use it.

The format is detected from the first bytes, the size is checked, and the decoded picture is
composited on white and rotated upright. Unreadable metadata counts as absent. A JPEG with several
pictures (MPO, from phones) yields the first one. Every exception of Pillow becomes an InputError.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from core.errors import InputError

cv2.setNumThreads(0)  # pictures are spread over threads and processes; its own pool only spins

MOST_PIXELS = 24_000_000
"""24 megapixels, a camera's; decoding holds four bytes per pixel."""
_LARGE = 4_000_000
"""Pictures with at least this many pixels are decoded one at a time, to bound memory."""
_ONE_LARGE = Lock()
_TOGETHER = 1_000_000
"""Pixels that are converted together."""
_WHITE = 255
_NARROW, _AREA = 72, cv2.INTER_AREA
BANDS, BAND_BITS = 4, 32
"""A perceptual hash is BANDS words of BAND_BITS bits."""
LOOK_BITS = BANDS * BAND_BITS
_ORIENTATION = 0x0112
_OF_RGB_16 = "RGB;16B", "RGB;16L"
"""Pillow's raw modes that read the high bytes, and the low bytes, of 16-bit samples."""
_GREY_KEYS = {"1": (1, 255), "L;2": (3, 85), "L;4": (15, 17), "L": (255, 1)}
"""PNG greyscale raw mode -> (mask of a transparent sample, factor to 8 bits)."""

warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged metadata

Rgb = NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """The facts about a picture that `tapir pack` needs."""

    width: int
    height: int
    look: bytes
    """Perceptual hash of LOOK_BITS bits (`perceptual_hash`)."""


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    """A decoded picture, before it is rotated upright."""

    width: int
    height: int
    orientation: object
    parts: Iterator[tuple[slice, Rgb]]
    """(rows, pixels on white), some rows at a time."""


def decode_rgb(data: bytes, where: str) -> Rgb:
    """Decode one image; transparency becomes white, EXIF rotation is applied, 16 bits become 8.

    Shapes: returns (height, width, 3) uint8.
    Raises: InputError unless it is a whole still PNG, JPEG or WebP within the size limit.
    """
    return _decode(data, where, _whole)


def inspect(data: bytes, where: str) -> Inspected:
    """Decode a picture as `decode_rgb` does, and return only the facts that `pack` needs.

    Raises: InputError as `decode_rgb` does.
    """
    return _decode(data, where, _glance)


def _decode(data: bytes, where: str, keep: Callable[[_Decoded], T]) -> T:
    try:
        with _opened(data, where) as image:
            if image.width * image.height < _LARGE:
                return keep(_decoded(image, data, where))
            with _ONE_LARGE:
                return keep(_decoded(image, data, where))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow raises nearly anything for damaged files
        raise InputError(
            f"{where} is not a readable PNG, JPEG or WebP image: {error or type(error).__name__}"
        ) from error


def _whole(picture: _Decoded) -> Rgb:
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for rows, part in picture.parts:
        pixels[rows] = part
    return _upright(pixels, picture.orientation)


def _glance(picture: _Decoded) -> Inspected:
    """Size and perceptual hash, computed without a second full copy of a large picture."""
    narrow = [
        cv2.resize(
            cv2.cvtColor(part, cv2.COLOR_RGB2GRAY), (_NARROW, len(part)), interpolation=_AREA
        )
        for _, part in picture.parts
    ]
    look = perceptual_hash(_upright(np.concatenate(narrow), picture.orientation))
    sides = (picture.width, picture.height)
    width, height = sides[::-1] if _is_transposed(picture.orientation) else sides
    return Inspected(width=width, height=height, look=look)


def perceptual_hash(grey: NDArray[np.uint8]) -> bytes:
    """Difference hash: is a pixel of the reduced picture brighter than its neighbour?

    64 bits compare neighbours in the rows of 9x8 pixels, 64 those in the columns of 8x9. Each band
    has 16 bits of either kind, spread over the whole picture (`bit_order`).

    Shapes: (height, width) uint8 -> 16 bytes; band b is bytes 4b to 4b + 3.
    """
    wide = np.asarray(cv2.resize(grey, (9, 8), interpolation=_AREA), np.int16)
    high = np.asarray(cv2.resize(grey, (8, 9), interpolation=_AREA), np.int16)
    return _packed(wide[:, 1:] > wide[:, :-1], high[1:] > high[:-1])


def _packed(across: NDArray[np.bool_], down: NDArray[np.bool_]) -> bytes:
    return np.packbits(np.stack([across, down]).reshape(-1)[_BIT_ORDER]).tobytes()


def bit_order() -> NDArray[np.intp]:
    """Sort bits by band: (row + column) % BANDS across, and two bands further down."""
    row, column = np.indices((8, 8))
    bands = np.stack([row + column, row + column + 2]) % BANDS
    return np.argsort(bands.reshape(-1), kind="stable")


_BIT_ORDER = bit_order()
_NONE, _ALL = np.zeros((8, 8), bool), np.ones((8, 8), bool)
FLAT_LOOKS = tuple(sorted(_packed(a, d) for a in (_NONE, _ALL) for d in (_NONE, _ALL)))
"""Hashes of flat pictures and of ramps of brightness."""
FLAT_BITS = 8
"""A hash that differs from one of FLAT_LOOKS in at most this many bits says too little to tell two
pictures apart: skies, gradients and blurred walls (decision 030 has the measurement)."""


def _opened(data: bytes, where: str) -> ImageFile:
    file = io.BytesIO(data)
    image: ImageFile
    if data[:3] == b"\xff\xd8\xff":
        image = JpegImageFile(file)  # Image.open would search for more pictures
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        image = PngImageFile(file)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        image = WebPImageFile(file)
    else:
        raise InputError(f"{where} is not a PNG, JPEG or WebP, or its start is damaged")
    if image.width * image.height > MOST_PIXELS:
        raise InputError(
            f"{where} has {image.width}x{image.height} pixels; the limit is {MOST_PIXELS}"
        )
    if getattr(image, "is_animated", False):
        raise InputError(f"{where} is an animation; give a still picture")
    return image


def _decoded(image: ImageFile, data: bytes, where: str) -> _Decoded:
    samples = image.tile[0].args if image.tile else ""
    image.load()
    low = None
    if samples == _OF_RGB_16[0] and "transparency" in image.info:
        low = PngImageFile(io.BytesIO(data))
        low.tile = [low.tile[0]._replace(args=_OF_RGB_16[1])]
        low.load()
    if image.mode not in MODES:
        raise InputError(f"{where} has pixels of the mode {image.mode}; save it as RGB")
    return _Decoded(
        width=image.width,
        height=image.height,
        orientation=_orientation(image),
        parts=_on_white(image, samples, low),
    )


def _on_white(
    image: Image.Image, samples: Any, low: Image.Image | None
) -> Iterator[tuple[slice, Rgb]]:
    """Convert some rows at a time with MODES; `low` has the low bytes of 16-bit RGB."""
    rows = max(1, _TOGETHER // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        box = (0, top, image.width, bottom)
        part = image.crop(box)
        pixels = MODES[image.mode](part)
        clear = _transparent(part, samples, low.crop(box) if low else None)
        if clear is not None:
            pixels = np.where(clear[:, :, None], np.uint8(_WHITE), pixels)
        yield slice(top, bottom), pixels


def _transparent(part: Image.Image, samples: Any, low: Image.Image | None) -> Any:
    """Mask of the pixels that equal a PNG's transparent colour; None if it has none.

    Source: the PNG specification, tRNS: only the low bits count for samples with fewer than 16
    bits; both bytes are compared for 16-bit samples.
    """
    key = part.info.get("transparency")
    if key is None or part.mode not in ("1", "L", "I;16", "RGB"):
        return None
    if part.mode == "RGB":
        colour = np.array(key, np.int64)
        high = colour >> 8 if low else colour & 255
        clear = (np.asarray(part) == high).all(-1)
        return clear & (np.asarray(low) == colour & 255).all(-1) if low else clear
    if part.mode == "I;16":
        return np.asarray(part, np.int32) == int(key)
    mask, scale = _GREY_KEYS.get(samples, (255, 1))
    return np.asarray(part.convert("L")) == (int(key) & mask) * scale


def _plain(part: Image.Image) -> Rgb:
    return np.asarray(part if part.mode == "RGB" else part.convert("RGB"))


def _palette(part: Image.Image) -> Rgb:
    return _blended(part) if "transparency" in part.info else _plain(part)


def _blended(part: Image.Image) -> Rgb:
    colours = part.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    return np.asarray(Image.alpha_composite(white, colours).convert("RGB"))


def _sixteen_bits(part: Image.Image) -> Rgb:
    """Convert 16-bit grey, which Pillow's own conversion would clip."""
    grey = (np.asarray(part, np.int32) >> 8).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, 2)


MODES: dict[str, Callable[[Image.Image], Rgb]] = {
    "1": _plain,
    "L": _plain,
    "RGB": _plain,
    "RGBX": _plain,
    "CMYK": _plain,
    "P": _palette,
    "LA": _blended,
    "PA": _blended,
    "RGBA": _blended,
    "I": _sixteen_bits,
    "I;16": _sixteen_bits,
    "I;16B": _sixteen_bits,
}
"""Pillow's modes of PNG, JPEG and WebP -> conversion to RGB on white."""


def _orientation(image: Image.Image) -> object:
    """Orientation from EXIF, else from XMP; 1 if it is absent or damaged."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises nearly anything for damaged metadata
        return 1


def _is_transposed(orientation: object) -> bool:
    return isinstance(orientation, int) and 5 <= orientation <= 8


def _upright(pixels: NDArray[Any], orientation: object) -> NDArray[Any]:
    """Undo an EXIF orientation by a transpose and flips."""
    turned = np.swapaxes(pixels, 0, 1) if _is_transposed(orientation) else pixels
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)
