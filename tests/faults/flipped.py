"""Pictures with flipped bytes: what `pack` accepts decodes, and nothing but InputError is raised.

`python -m tests.faults.flipped [COUNT [SEED]]` tries many; a test tries some.
"""

import io
import struct
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from core.errors import InputError
from data_pipeline.images.decode import decode_rgb, inspect
from tests.faults.corpus import chunk, png_of

SIZE = (24, 20)
OTHERS = ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "DDS", "JPEG2000", "AVIF")
"""Formats that Pillow reads and Tapir refuses."""


def _noise(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 4), np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def _saved(image: Image.Image, kind: str, **save: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010E] = 6, (72, 1), "a picture"
    return exif.tobytes()


def _sixteen() -> Iterator[tuple[str, bytes]]:
    width, height = SIZE
    for colour, samples in ((0, 1), (2, 3), (4, 2), (6, 4)):
        values = (i * 37 for i in range(width * samples))
        row = b"\0" + struct.pack(f">{width * samples}H", *values)
        key = {0: b"\0\0", 2: b"\0\0\0\x25\0\x4a"}.get(colour)
        extra = [chunk(b"tRNS", key)] if key else []
        yield (
            f"png 16 bits, colour {colour}",
            png_of(width, height, 16, colour, row * height, *extra),
        )


def originals() -> dict[str, bytes]:
    """Whole pictures of all formats and modes, by name."""
    rgb, text = _noise("RGB"), PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 12\n" + _exif().hex())
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    files = {f"png {m}": _saved(_noise(m), "PNG") for m in ("1", "L", "LA", "P", "RGB", "RGBA")}
    files |= dict(_sixteen())
    files["png trns"] = _saved(_noise("P"), "PNG", transparency=3)
    files["png exif"] = _saved(rgb, "PNG", exif=_exif())
    files["png text"] = _saved(rgb, "PNG", pnginfo=text)
    files["png profile"] = _saved(rgb, "PNG", icc_profile=b"\0" * 128, dpi=(72, 72))
    for mode in ("L", "RGB", "CMYK"):
        files[f"jpeg {mode}"] = _saved(_noise(mode), "JPEG")
    files["jpeg exif"] = _saved(rgb, "JPEG", exif=_exif(), progressive=True)
    files["jpeg two"] = _saved(rgb, "MPO", save_all=True, append_images=[_noise("RGB")])
    files["webp lossy"] = _saved(rgb, "WEBP", exif=_exif())
    files["webp lossless"] = _saved(_noise("RGBA"), "WEBP", lossless=True)
    files["webp moving"] = _saved(rgb, "WEBP", save_all=True, append_images=[_noise("L")])
    for kind in OTHERS:
        try:
            files[kind] = _saved(rgb, kind)
        except (KeyError, OSError):  # this Pillow is built without the format
            continue
    return files


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    """Change one to four bytes, half of the time near the start, and now and then the length.

    Half of the PNGs get valid checksums, so that the code after the checksum is tested.
    """
    changed = bytearray(data)
    reach = len(data) if rng.integers(2) else min(len(data), 120)
    for _ in range(rng.integers(1, 5)):
        changed[rng.integers(reach)] ^= rng.integers(1, 256)
    if rng.integers(20) == 0:
        return bytes(changed[: rng.integers(len(data))])
    is_png = data[:4] == b"\x89PNG"
    return _sealed(bytes(changed)) if is_png and rng.integers(2) else bytes(changed)


def _sealed(data: bytes) -> bytes:
    """A PNG with recomputed chunk checksums, as far as its lengths are valid."""
    sealed, at = data[:8], 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        body = data[at + 8 : at + 8 + length]
        if length > len(data) or len(body) < length:
            break
        sealed += chunk(data[at + 4 : at + 8], body)
        at += 12 + length
    return sealed + data[at:]


def try_flips(count: int, seed: int) -> Counter[str]:
    """Try `count` flipped pictures; how many were accepted and refused.

    Raises: AssertionError if two reads of a picture differ, or anything but InputError is raised.
    """
    rng, names, counts = np.random.default_rng(seed), originals(), Counter[str]()
    for number in range(count):
        name = list(names)[number % len(names)]
        data = flip(names[name], rng)
        verdicts = [_verdict(look, data, f"{name} {number} of seed {seed}") for look in range(2)]
        assert verdicts[0] == verdicts[1], (name, number, seed, verdicts)
        counts[f"{name.split()[0]} {'accepted' if verdicts[0] else 'refused'}"] += 1
    return counts


def _verdict(look: int, data: bytes, where: str) -> tuple[int, int] | None:
    """The size that `inspect` (0) or `decode_rgb` (1) sees; None if it refuses."""
    try:
        if look == 0:
            seen = inspect(data, where)
            return seen.height, seen.width
        pixels = decode_rgb(data, where)
    except InputError:
        return None
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return pixels.shape[0], pixels.shape[1]


if __name__ == "__main__":
    asked = [int(text) for text in sys.argv[1:]]
    for kind, times in sorted(try_flips(*(asked + [100_000, 0][len(asked) :])).items()):
        print(f"{times:7d} {kind}")
