"""A corpus of hostile and broken files, with some that are valid but unusual."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

SIZE = (48, 40)


def picture(
    kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = SIZE, **save: object
) -> bytes:
    """One encoded picture."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **save)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG from its raw rows."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def _frames() -> list[Image.Image]:
    return [Image.new("RGB", SIZE, (shade, 0, 0)) for shade in (0, 99, 200)]


def _animated(kind: str) -> bytes:
    buffer, (first, *others) = io.BytesIO(), _frames()
    first.save(buffer, kind, save_all=True, append_images=others)
    return buffer.getvalue()


def _zipped(marker: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("__main__.py", f"open({str(marker)!r}, 'w').close()")
    return buffer.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("JPEG", exif=exif.tobytes())


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def accepted() -> dict[str, bytes]:
    """Unusual but valid pictures, which are packed."""
    sixteen = b"".join(b"\0" + b"\xab\xcd" * 3 * 40 for _ in range(40))
    return {
        "cmyk.jpg": picture("JPEG", "CMYK"),
        "grey16.png": picture("PNG", "I;16"),
        "rgb16.png": png_of(40, 40, 16, 2, sixteen),
        "rotated.jpg": _rotated(),
        "palette.png": picture("PNG", "P", transparency=0),
        "grey-alpha.png": picture("PNG", "LA"),
        "one-bit.png": picture("PNG", "1"),
        "one-pixel.png": picture("PNG", size=(1, 1)),
        "progressive.jpg": picture("JPEG", progressive=True),
        "lossless.webp": picture("WEBP", lossless=True),
        "named-jpg-is-png.jpg": picture("PNG"),
        "twice.tar.png": picture("PNG"),
        "large.png": picture("PNG", size=(6000, 4000)),
        "new\nline.png": picture("PNG"),
        "x" * 200 + ".png": picture("PNG"),
    }


def polyglots(marker: Path) -> dict[str, bytes]:
    """Files that are valid pictures and another format as well."""
    return {
        "jpeg-and-zip.jpg": picture("JPEG") + _zipped(marker),
        "png-and-script.png": picture("PNG") + f"\n#!/bin/sh\ntouch {marker}\n".encode(),
    }


def refused(marker: Path) -> dict[str, bytes]:
    """Files named like pictures that every loader must refuse."""
    whole, jpeg = picture("PNG"), picture("JPEG", size=(200, 200))
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * 80_000_000, zip=True)
    profile = b"p\0\0" + zlib.compress(b"\0" * 80_000_000)
    entity = f"<!DOCTYPE s [<!ENTITY x SYSTEM 'file://{marker}'>]><svg>&x;</svg>"
    big = struct.pack(">HBHHB", 0xFFC0, 0, 0, 0, 0)
    return {
        "bomb-81mp.png": picture("PNG", "1", (9000, 9000)),
        "bomb-claimed.png": png_of(50_000, 50_000, 8, 2, b"\0"),
        "bomb.jpg": b"\xff\xd8" + big[:2] + b"\0\x0b\x08\xff\xdc\xff\xdc\x01\x01\x11\0\xff\xd9",
        "bomb-claimed-too.webp": _claimed_webp(),
        "bomb-text.png": picture("PNG", pnginfo=text),
        "bomb-profile.png": png_of(1, 1, 8, 2, b"\0" * 5, chunk(b"iCCP", profile)),
        "html.jpg": b"<html><script>alert(1)</script></html>",
        "svg.png": entity.encode(),
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half-too.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "one-byte.jpg": b"\xff",
        "header-only.png": whole[:8],
        "flipped-header.png": _flipped(whole, 18),
        "flipped-data.png": _flipped(whole, len(whole) - 20),
        "zero-size.png": png_of(0, 0, 8, 2, b""),
        "gif.png": picture("GIF"),
        "tiff.jpg": picture("TIFF"),
        "bmp.png": picture("BMP"),
        "animated.webp": _animated("WEBP"),
        "animated-too.png": _animated("PNG"),
        "pickle.png": b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
        "noise.jpg": np.random.default_rng(0).bytes(5000),
    }


def _claimed_webp() -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xfe\x3f\0" * 2
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


CAPTIONS = {
    "bad-utf8": b"caf\xe9 \xff\xfe",
    "nothing": b"",
    "white": b" \n\t ",
    "control": b"\0\x01\x02\x1b",
}
"""Captions that are none."""
ODD_CAPTIONS = {
    "long": b"very " * 2_000_000,
    "escapes": b"a \x1b[31mred\x1b[0m\ncat\0",
    "right-to-left": "\u202eevil \u05d0\u05d1 ok".encode(),
    "template": b"{{7*7}} ${jndi:ldap://x} <script>alert(1)</script>",
}
"""Captions that are packed, cleaned."""


def write_folder(root: Path, marker: Path) -> dict[str, bool]:
    """Write the corpus; returns for each file whether it must be packed (with its caption)."""
    root.mkdir()
    expected: dict[str, bool] = {}
    groups = [(accepted(), True), (polyglots(marker), True), (refused(marker), False)]
    for files, good in groups:
        for name, data in files.items():
            (root / name).write_bytes(data)
            (root / name).with_suffix(".txt").write_text("a caption of words")
            expected[name] = good
    for captions, good in ((CAPTIONS, False), (ODD_CAPTIONS, True)):
        for name, text in captions.items():
            (root / f"{name}.png").write_bytes(picture())
            (root / f"{name}.txt").write_bytes(text)
            expected[f"{name}.png"] = good
    (root / "no-caption.png").write_bytes(picture())
    (root / "no-picture.txt").write_text("alone")
    for name, text in _programs(marker):
        (root / name).write_bytes(text)
        (root / name).chmod(0o755)
        expected[name] = False
    (root / "link.png").symlink_to("/etc/passwd")
    (root / "link.txt").write_text("a link")
    (root / "folder-link").symlink_to("/etc")
    os.mkfifo(root / "fifo.png")
    (root / "fifo.txt").write_text("a pipe")
    Path(os.fsdecode(os.fsencode(root) + b"/bad-\xff-name.png")).write_bytes(picture())
    names = ("no-caption.png", "no-picture.txt", "link.png", "folder-link", "fifo.png")
    return {**expected, **dict.fromkeys([*names, "bad-"], False)}


def _programs(marker: Path) -> Iterator[tuple[str, bytes]]:
    pickled = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for extension in ("pyd", "pkl", "pickle", "pth", "pt"):
        yield f"harm.{extension}", pickled
    yield "run.sh", f"#!/bin/sh\ntouch {marker}\n".encode()
    yield "__init__.py", f"open({str(marker)!r}, 'w')\n".encode()


def write_tar(path: Path, marker: Path) -> int:
    """Write a tar of good pairs and members outside its folder; returns the number of good ones."""
    pickled = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            _add(tar, f"good{i}.png", picture())
            _add(tar, f"good{i}.txt", b"a good pair")
        for name in ("../escape.png", "/absolute.png", "a/../../escape.png"):
            _add(tar, name, picture())
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            _link(tar, name, kind)
        for name, kind in (("fifo.png", tarfile.FIFOTYPE), ("device.png", tarfile.CHRTYPE)):
            _link(tar, name, kind)
        for extension in ("pyd", "pickle", "pth"):
            _add(tar, f"harm.{extension}", pickled)
        _add(tar, "last.png", picture())
        _add(tar, "last.txt", b"a good pair after all that")
    return 4


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _link(tar: tarfile.TarFile, name: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    tar.addfile(member)
