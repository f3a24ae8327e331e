"""Decoding of pictures: every mode, transparency and orientation, and damaged metadata."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from core.errors import InputError
from data_pipeline.images.decode import MODES, decode_rgb, inspect
from tests.faults.corpus import chunk, png_of
from tests.faults.flipped import try_flips

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about metadata
ON_WHITE = {
    "1": (255, [255, 255, 255]),
    "L": (77, [77, 77, 77]),
    "RGB": ((1, 2, 3), [1, 2, 3]),
    "RGBX": ((1, 2, 3, 9), [1, 2, 3]),
    "CMYK": ((0, 255, 51, 0), [255, 0, 204]),
    "P": (5, [40, 50, 60]),
    "LA": ((0, 128), [127, 127, 127]),
    "PA": ((5, 0), [255, 255, 255]),
    "RGBA": ((0, 255, 100, 51), [204, 255, 224]),
    "I": (0xABCD, [0xAB] * 3),
    "I;16": (0xABCD, [0xAB] * 3),
    "I;16B": (0xABCD, [0xAB] * 3),
}
"""A pixel of each mode, and what it is on white: of an alpha a, (a c + (255 - a) 255) / 255."""


def _saved(image: Image.Image, kind: str, **save: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


def _mixed(size: tuple[int, int] = (6, 4)) -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


def test_every_mode_becomes_rgb_on_white() -> None:
    assert ON_WHITE.keys() == MODES.keys()
    for mode, (pixel, expected) in ON_WHITE.items():
        image = Image.new(mode, (2, 1))
        if mode in ("P", "PA"):
            image.putpalette([0] * 15 + [40, 50, 60])
        image.putpixel((1, 0), pixel)
        assert MODES[mode](image)[0, 1].tolist() == expected, mode


def test_pictures_of_many_rows_are_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    image = _mixed((7, 50)).convert("RGBA")
    image.putalpha(Image.fromarray(np.random.default_rng(4).integers(0, 256, (50, 7), np.uint8)))
    data = _saved(image, "PNG")
    whole = decode_rgb(data, "x")
    monkeypatch.setattr("data_pipeline.images.decode._TOGETHER", 20)
    assert (decode_rgb(data, "x") == whole).all()
    colours, alpha = np.asarray(image, np.int64)[..., :3], np.asarray(image, np.int64)[..., 3:]
    exact = (alpha * colours + (255 - alpha) * 255) / 255
    assert np.abs(whole - exact).max() <= 0.5


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "expected"),
    [
        (1, 0, b"\x40", b"\0\1", [0, 255]),
        (1, 0, b"\x40", b"\0\0", [255, 255]),
        (2, 0, b"\x60", b"\0\1", [255, 170]),
        (4, 0, b"\x5a", b"\0\x05", [255, 170]),
        (8, 0, b"\x05\x06", b"\4\5", [255, 6]),
        (16, 0, b"\0\7\0\6", b"\0\6", [0, 255]),
        (16, 0, b"\xff\xff\x80\0", b"\0\0", [255, 128]),
        (8, 2, b"\1\2\3\1\2\4", b"\0\1\0\2\0\3", [255, 1]),
        (8, 2, b"\1\2\3\1\2\4", b"\4\1\0\2\0\3", [255, 1]),
        (16, 2, b"\1\5\0\0\0\0\1\6\0\0\0\0", b"\1\6\0\0\0\0", [1, 255]),
    ],
)
def test_a_png_s_one_transparent_colour_is_white_and_its_neighbours_are_not(
    depth: int, colour: int, row: bytes, key: bytes, expected: list[int]
) -> None:
    """By the PNG specification: low bits count, and both bytes of 16-bit samples."""
    data = png_of(2, 1, depth, colour, b"\0" + row, chunk(b"tRNS", key))
    assert decode_rgb(data, "x")[0, :, 0].tolist() == expected


def test_a_palette_with_alphas_is_blended() -> None:
    extra = chunk(b"PLTE", bytes([0, 0, 0, 10, 20, 30])), chunk(b"tRNS", b"\x80")
    data = png_of(2, 1, 8, 3, b"\0\0\1", *extra)
    assert decode_rgb(data, "x")[0].tolist() == [[127] * 3, [10, 20, 30]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientations_are_those_of_pillow(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _saved(_mixed(), kind, exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (decode_rgb(data, "x") == expected).all()


def _ifd(*entries: tuple[int, int, int, bytes], data: bytes = b"") -> bytes:
    """An EXIF block of raw entries (tag, type, count, four bytes of value)."""
    rows = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + rows + b"\0\0\0\0" + data


TURNED = (0x0112, 3, 1, b"\6\0\0\0")
AFTER_TWO = struct.pack("<I", 8 + 2 + 2 * 12 + 4)
EXIFS = {
    "garbage": (b"Exif\0\0no TIFF header at all", 1),
    "blank": (b"Exif\0\0", 1),
    "cut": (b"Exif\0\0II*\0", 1),
    "junk": (b"junk", 1),
    "out of range": (_ifd((0x0112, 3, 1, b"\x63\0\0\0")), 1),
    "a text": (_ifd((0x0112, 2, 2, b"6\0\0\0")), 1),
    "a signed resolution": (
        _ifd(TURNED, (0x011A, 10, 1, AFTER_TWO), data=struct.pack("<ii", -1, 0)),
        6,
    ),
    "a resolution of letters": (_ifd(TURNED, (0x011A, 2, 4, b"abcd")), 6),
    "a number for bytes": (_ifd(TURNED, (0x9286, 3, 1, b"\7\0\0\0")), 6),
    "an unknown type": (_ifd(TURNED, (0x011A, 77, 1, b"\0\0\0\0")), 6),
    "a loop": (_ifd(TURNED, (0x8769, 4, 1, struct.pack("<I", 8))), 6),
    "a huge count": (_ifd(TURNED, (0x010F, 2, 2**31, b"\0\0\0\0")), 6),
}
"""Damaged and odd metadata of whole pictures, and which orientation counts."""


@pytest.mark.parametrize("name", EXIFS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_metadata_harms_no_picture(name: str, kind: str) -> None:
    exif, orientation = EXIFS[name]
    data = _saved(_mixed(), kind)
    plain = decode_rgb(data, "x")
    if kind == "JPEG":
        odd = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    elif kind == "PNG":
        odd = data[:33] + chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) + data[33:]
    else:
        odd = _saved(_mixed(), kind, exif=exif)
    pixels = decode_rgb(odd, "x")
    expected = np.rot90(plain, -1) if orientation == 6 else plain
    assert pixels.shape == expected.shape and (pixels == expected).all()
    seen = inspect(odd, "x")
    assert (seen.height, seen.width) == pixels.shape[:2]


def test_orientations_in_texts_count_and_damaged_texts_do_not() -> None:
    plain = decode_rgb(_saved(_mixed(), "PNG"), "x")
    for text in ("short", "\nexif\n   12\nzz not hex zz\n"):
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif", text)
        assert (decode_rgb(_saved(_mixed(), "PNG", pnginfo=info), "x") == plain).all()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    turned = decode_rgb(_saved(_mixed(), "PNG", pnginfo=info), "x")
    assert (turned == np.rot90(plain)).all()


def test_of_a_jpeg_with_more_pictures_the_first_is_the_photo() -> None:
    """Phones append a second picture to the photo and list it in the header (MPF)."""
    first, second = Image.new("RGB", (32, 16), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    data = _saved(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert (decode_rgb(data, "x") == decode_rgb(_saved(first, "JPEG"), "x")).all()
    assert inspect(data, "x").width == 32
    at = data.index(b"MPF\0") + 4
    for place in range(at, at + 60, 3):  # the damaged index of appended pictures is not read
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        assert decode_rgb(bytes(damaged), "x").shape == (16, 32, 3)


def test_animations_are_refused_and_animations_of_one_picture_are_pictures() -> None:
    for kind in ("PNG", "WEBP"):
        one = _saved(_mixed(), kind, save_all=True, append_images=[])
        assert decode_rgb(one, "x").shape == (4, 6, 3)
        two = _saved(_mixed(), kind, save_all=True, append_images=[Image.new("RGB", (6, 4))])
        for look in (inspect, decode_rgb):
            with pytest.raises(InputError, match="x is an animation"):
                look(two, "x")


@pytest.mark.seconds
def test_whatever_is_accepted_decodes_and_all_else_is_an_input_error() -> None:
    outcomes = try_flips(6000, 24)
    assert outcomes.total() == 6000
    assert all(outcomes[f"{kind} accepted"] > 50 for kind in ("png", "jpeg", "webp"))
    assert not outcomes["GIF accepted"] and outcomes["GIF refused"]
