"""Forty requests that no friendly client sends."""

import io
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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


def bomb(side: int) -> bytes:
    """A PNG whose header states a huge picture, with few bytes behind it."""
    small = io.BytesIO()
    small.write(b"\x89PNG\r\n\x1a\n")
    head = side.to_bytes(4, "big") * 2 + b"\x08\x06\x00\x00\x00"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        small.write(len(body).to_bytes(4, "big") + kind + body + crc)
    return small.getvalue()


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
    Hostile(name="up a path", method="GET", path="/pictures/..%2f..%2fetc.png", right=(404,)),
    Hostile(name="up the page", method="GET", path="/..%2fconfig.py", right=(404,)),
    Hostile(name="NUL in a path", method="GET", path="/pictures/%00.png", right=(404,)),
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
    _edit("a decompression bomb", bomb(60_000), None, 413),
    _edit("a bomb as mask", _IMAGE, bomb(60_000), 413),
]
