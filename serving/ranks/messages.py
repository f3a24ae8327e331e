"""What a server and rank 0 of a model tell each other over a Unix socket: JSON, then bytes.

A frame is the length of its JSON (4 bytes, little-endian), the JSON, and the blobs whose lengths
the JSON names. Imports no torch.
"""

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from generation.config import ModelPaths
from parallel.config import MeshConfig

_HEAD = struct.Struct("<I")
_MOST = 2**28
"""Bytes of a frame's JSON or blobs; more is a fault of the link."""


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """What a rank needs to know at its start."""

    models: ModelPaths
    mesh: MeshConfig
    rows: int
    precision: str
    rerank: bool
    link: str
    """Path of the server's socket."""
    number: int = 0
    """Of the server's models, so that they take different GPUs while there are any."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What clients may know of a model."""

    pixels: int
    """Side of its pictures."""
    rows: int
    """Rows of image tokens."""
    columns: int
    text_length: int
    """Text tokens that the prior reads."""
    guidance: bool
    """True if the prior knows the empty caption."""
    ranker: str
    """Name of the network that ranks; empty: pictures are not ranked."""
    step: int | None
    """The prior's checkpoint, if one was named."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One request's pictures."""

    job: int
    caption: str
    """Cleaned, as it stands in the keys."""
    candidates: int
    seed: int
    """Keys of the pictures: (seed, caption, candidate number)."""
    temperature: float
    top_k: int
    top_p: float
    guidance: float
    partials: tuple[int, ...] = ()
    """Rows of tokens after which the unfinished picture is sent, 1 = the first row."""
    kept: tuple[int, ...] = ()
    """0 or 1 for each token of an image prompt, whose pixels follow as a blob; empty: no prompt."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One message."""

    kind: str
    body: Mapping[str, Any]
    blobs: tuple[bytes, ...] = ()


def packed(kind: str, body: Mapping[str, Any] | None = None, *blobs: bytes) -> bytes:
    """Encode a frame."""
    head = {"kind": kind, "body": body or {}, "blobs": [len(blob) for blob in blobs]}
    text = json.dumps(head).encode()
    return b"".join([_HEAD.pack(len(text)), text, *blobs])


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; None if the other side is gone."""
    try:
        (length,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        head = json.loads(await reader.readexactly(min(length, _MOST)))
        blobs = [await reader.readexactly(min(size, _MOST)) for size in head["blobs"]]
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return Frame(kind=head["kind"], body=head["body"], blobs=tuple(blobs))


def receive_frame(link: socket.socket) -> Frame | None:
    """The next frame, for a thread; None if the other side is gone."""
    if (first := _exactly(link, _HEAD.size)) is None:
        return None
    if (text := _exactly(link, _HEAD.unpack(first)[0])) is None:
        return None
    head, blobs = json.loads(text), []
    for size in head["blobs"]:
        if (blob := _exactly(link, size)) is None:
            return None
        blobs.append(blob)
    return Frame(kind=head["kind"], body=head["body"], blobs=tuple(blobs))


def _exactly(link: socket.socket, count: int) -> bytes | None:
    parts, left = [], min(count, _MOST)
    while left:
        try:
            part = link.recv(min(left, 2**20))
        except OSError:
            return None
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
