"""Ninety requests that no friendly client sends, and pictures that are odd but whole."""

import io
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests.multiprocess.serving.served import mask_png, png

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
_JSON = {"content-type": "application/json"}
_IMAGE = png(np.zeros((16, 16, 3)))


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """A request, and the statuses that are right answers."""

    name: str
    path: str = GENERATE
    method: str = "POST"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    files: Any = None
    data: Any = None
    right: tuple[int, ...] = (400,)


def _fields(name: str, right: tuple[int, ...] = (400,), **fields: Any) -> Hostile:
    body = json.dumps({"prompt": "a small red circle", **fields}).encode()
    return Hostile(name=name, body=body, headers=_JSON, right=right)


def _raw(name: str, body: bytes, *right: int) -> Hostile:
    return Hostile(name=name, body=body, headers=_JSON, right=right or (400,))


def _edit(name: str, image: bytes, mask: bytes | None, *right: int) -> Hostile:
    files = {"image": ("../../etc/passwd", image, "image/png")}
    if mask is not None:
        files["mask"] = ("mask.png", mask, "image/png")
    data = {"prompt": "two blue squares"}
    return Hostile(name=name, path=EDIT, files=files, data=data, right=right or (400,))


def saved(kind: str, mode: str = "RGBA", **more: Any) -> bytes:
    """A grey picture in a format and a mode of Pillow."""
    file = io.BytesIO()
    Image.new(mode, (16, 16), 7).save(file, kind, **more)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    crc = zlib.crc32(kind + body).to_bytes(4, "big")
    return len(body).to_bytes(4, "big") + kind + body + crc


def with_chunk(kind: bytes, body: bytes) -> bytes:
    """A small PNG with one more chunk after its header."""
    return _IMAGE[:33] + chunk(kind, body) + _IMAGE[33:]


def bomb(side: int) -> bytes:
    """A PNG whose header states a huge picture, with few bytes behind it."""
    small = io.BytesIO()
    small.write(b"\x89PNG\r\n\x1a\n")
    head = side.to_bytes(4, "big") * 2 + b"\x08\x06\x00\x00\x00"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        small.write(chunk(kind, body))
    return small.getvalue()


_ZEROS = zlib.compress(bytes(10**8))
"""100 MB in 100 kB."""
_FRAMES = [Image.new("RGBA", (16, 16), (i, 0, 0, 0)) for i in range(3)]
_FORM = {"content-type": "multipart/form-data; boundary=b"}


def _form(name: str, *parts: bytes) -> Hostile:
    """A form of parts, each with its head."""
    body = b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    return Hostile(name=name, path=EDIT, body=body + b"--b--\r\n", headers=_FORM)


def _get(name: str, path: str, *right: int) -> Hostile:
    return Hostile(name=name, method="GET", path=path, right=right or (404,))


HOSTILE = [
    _raw("empty body", b""),
    _raw("no JSON", b"{"),
    _raw("a list", b"[]"),
    _raw("a number", b"7"),
    _raw("null", b"null"),
    _raw("deep nesting", b"[" * 100_000),
    _raw("deep objects", b'{"prompt":' * 50_000),
    _raw("not UTF-8", b'{"prompt": "\xff\xfe"}'),
    _raw("NaN", b'{"prompt": "a", "temperature": NaN}'),
    _raw("infinity", b'{"prompt": "a", "guidance": Infinity}'),
    _raw("a huge number", b'{"prompt": "a", "n": ' + b"9" * 4000 + b"}"),
    _raw("a lone surrogate", b'{"prompt": "\\ud800"}'),
    _raw("an object as caption", b'{"prompt": {"$gt": ""}}'),
    _fields("no caption", prompt=""),
    _fields("an invisible caption", prompt="\u200b\u2060 \t"),
    _fields("a long caption", prompt="a" * 5000),
    _fields("no pictures", n=0),
    _fields("minus one picture", n=-1),
    _fields("a million pictures", n=10**6),
    _fields("half a picture", n=0.5),
    _fields("negative temperature", temperature=-1),
    _fields("tiny temperature", temperature=1e-30),
    _fields("huge guidance", guidance=1e30),
    _fields("top_p of 0", top_p=0),
    _fields("negative top_k", top_k=-5),
    _fields("huge top_k", top_k=2**80),
    _fields("negative key", seed=-1),
    _fields("huge key", seed=2**64),
    _fields("a size of no square", size="1x100000"),
    _fields("a huge size", size="99999x99999"),
    _fields("a size that is code", size="${7*7}"),
    _fields("an unknown field", __class__="x"),
    _fields("a model that is a path", (404,), model="../../../etc"),
    _fields("another output format", output_format="exe"),
    Hostile(name="text instead of JSON", body=b"{}", right=(415,)),
    Hostile(name="a form instead of JSON", data={"prompt": "a"}, right=(415,)),
    Hostile(name="another method", method="DELETE", right=(405,)),
    _fields("text as number of pictures", n="many"),
    _fields("a list as number of pictures", n=[1]),
    _fields("null as caption", prompt=None),
    _fields("a list of captions", prompt=["a", "b"]),
    _fields("a number as caption", prompt=7),
    _fields("a list as model", model=["tiny"]),
    _fields("an empty name of a model", (404,), model=""),
    _fields("markup as name of a model", (404,), model="<script>alert(1)</script>"),
    _fields("an object as key", seed={}),
    _fields("half a key", seed=0.5),
    _fields("an object as size", size={}),
    _fields("a size in other digits", size="\u0661\u0666x\u0661\u0666"),
    _fields("many unfinished pictures", partial_images=10**9, stream=True),
    _fields("an unknown answer", response_format="../file"),
    _fields("an address as image", image="file:///etc/passwd"),
    _fields("temperature as list", temperature=[0]),
    _fields("guidance as text", guidance="a lot"),
    _fields("stream as text", stream="perhaps"),
    _raw("two bodies", b'{"prompt": "a"}{"prompt": "b"}'),
    _raw("a byte order mark", b'\xef\xbb\xbf{"prompt": 1}'),
    _raw("UTF-16", '{"prompt": 1}'.encode("utf-16")),
    Hostile(
        name="a compressed bomb as JSON",
        body=_ZEROS,
        headers={**_JSON, "content-encoding": "deflate"},
    ),
    _get("up a path", "/pictures/..%2f..%2fetc.png"),
    _get("up a path in dots", "/pictures/../../../../etc/passwd"),
    _get("up a path twice encoded", "/pictures/%252e%252e%252fetc.png"),
    _get("up a path by backslashes", "/pictures/..%5c..%5cetc.png"),
    _get("an absolute path", "//etc/passwd"),
    _get("an absolute path of a picture", "/pictures/%2fetc%2fpasswd.png"),
    _get("an absolute path of a model", "/v1/models/%2fetc%2fpasswd"),
    _get("a path that is not UTF-8", "/pictures/%ff%fe.png"),
    _get("a long path", "/pictures/" + "a" * 20_000 + ".png"),
    _get("the server's code", "/page/../app.py"),
    _get("up the page", "/..%2fconfig.py"),
    _get("NUL in a path", "/pictures/%00.png"),
    Hostile(
        name="a form without boundary",
        path=EDIT,
        body=b"x",
        headers={"content-type": "multipart/form-data"},
    ),
    Hostile(
        name="a form that ends early",
        path=EDIT,
        body=b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc',
        headers={"content-type": "multipart/form-data; boundary=b"},
    ),
    _form("a form without parts"),
    _form(
        "a caption that is not UTF-8",
        b'name="prompt"\r\n\r\n\xff\xfe',
        b'name="image"; filename="a.png"\r\n\r\n' + _IMAGE,
    ),
    _form("a field without name", b'filename="a"\r\n\r\nabc'),
    _form("many fields", *[b'name="prompt"\r\n\r\na'] * 100),
    _form("a huge head", b'name="prompt"; x="' + b"a" * 100_000 + b'"\r\n\r\na'),
    _form("a picture as text", b'name="image"\r\n\r\n' + b"abc"),
    _form("a long field", b'name="prompt"\r\n\r\n' + b"a" * 100_000),
    Hostile(
        name="a codec that takes quadratic time",
        path=EDIT,
        body=b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--b--\r\n',
        headers={"content-type": "multipart/form-data; boundary=b; charset=punycode"},
        right=(415,),
    ),
    Hostile(
        name="a long boundary",
        path=EDIT,
        body=b"x",
        headers={"content-type": f"multipart/form-data; boundary={'b' * 5000}"},
    ),
    Hostile(name="an edit without picture", path=EDIT, files={"mask": ("m", _IMAGE, "image/png")}),
    Hostile(
        name="many files",
        path=EDIT,
        files=[("image", ("a.png", _IMAGE, "image/png"))] * 20,
        data={"prompt": "a"},
    ),
    _edit("a picture of no format", b"GIF89a" + bytes(100), None),
    _edit("half a PNG", _IMAGE[: len(_IMAGE) // 2], mask_png(16, slice(0, 8), slice(0, 8))),
    _edit("a picture without mask", _IMAGE, None),
    _edit("an opaque mask", _IMAGE, png(np.full((16, 16, 4), 255))),
    _edit("a clear mask", _IMAGE, png(np.zeros((16, 16, 4)))),
    _edit("a mask of another shape", _IMAGE, png(np.zeros((16, 32, 4)))),
    _edit("a mask without transparency", _IMAGE, saved("PNG", "RGB")),
    _edit("a mask that is a JPEG", _IMAGE, saved("JPEG", "RGB")),
    _edit("a GIF", saved("GIF", "L"), None),
    _edit("a TIFF", saved("TIFF", "RGB"), None),
    _edit("an SVG", b'<svg><image href="/etc/passwd"/></svg>', None),
    _edit("an empty picture", b"", None),
    _edit("an animated PNG", saved("PNG", save_all=True, append_images=_FRAMES), None),
    _edit("an animated WebP", saved("WEBP", save_all=True, append_images=_FRAMES), None),
    _edit("a bomb of text", with_chunk(b"zTXt", b"a\0\0" + _ZEROS), None),
    _edit("a bomb of a colour profile", with_chunk(b"iCCP", b"a\0\0" + _ZEROS), None),
    _edit("a bomb of pixels", _IMAGE[:33] + chunk(b"IDAT", _ZEROS) + chunk(b"IEND", b""), None),
    _edit("a chunk that is cut", _IMAGE[:33] + b"\x7f\xff\xff\xffIDAT", None),
    _edit("a decompression bomb", bomb(60_000), None, 413),
    _edit("a bomb as mask", _IMAGE, bomb(60_000), 413),
]


_HALF = mask_png(16, slice(0, 8), slice(0, 16))
_WIDE = png(np.where(np.arange(64)[None, :, None] < 32, 0, 255) * np.ones((16, 1, 4)))


def _odd(name: str, image: bytes, mask: bytes = _HALF) -> Hostile:
    return _edit(name, image, mask, 200)


def _palette() -> bytes:
    """A palette picture whose upper half is transparent."""
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.paste(0, (0, 0, 16, 8))
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=0)
    return file.getvalue()


ODD = [
    _odd("a CMYK JPEG", saved("JPEG", "CMYK")),
    _odd("a grey JPEG", saved("JPEG", "L")),
    _odd("a picture of 16 bits", saved("PNG", "I;16")),
    _odd("a palette", saved("PNG", "P")),
    _odd("a palette with a transparent colour as mask", _IMAGE, _palette()),
    _odd("a picture of one bit", saved("PNG", "1")),
    _odd("a WebP", saved("WEBP")),
    _odd("a wide picture and mask", png(np.zeros((16, 64, 3))), _WIDE),
    _odd("a mask of another size", _IMAGE, mask_png(300, slice(0, 150), slice(0, 300))),
    _fields("a caption with NUL", (200,), prompt="a\0red\0circle"),
    _fields("a caption right to left", (200,), prompt="\u202ecircle red a"),
    _fields("a caption of markup", (200,), prompt="<img src=x onerror=alert(1)>"),
    _fields("a caption of emoji", (200,), prompt="\U0001f9d1\u200d\U0001f680" * 50),
]
"""Requests that are unusual, and served."""
