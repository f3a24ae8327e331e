"""One raw image-caption pair, the unit that every source yields."""

import hashlib
import json
from dataclasses import dataclass

from data_pipeline.text.captions import is_odd, is_visible, joined


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An encoded image with its caption."""

    key: str
    """Unique name in the data set; the members of a shard are KEY.png, KEY.txt, KEY.json."""
    image: bytes
    """The encoded image, as it will be stored."""
    extension: str
    """png, jpg or webp: how the image is encoded."""
    caption: bytes
    """The captions, one per line; `pack` checks that they are UTF-8."""
    split_key: str
    """Pairs with the same split_key are in the same split (default: the key)."""
    where: str
    """Where it came from, for error messages."""


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A file or row that is not a usable pair; sources report every one of them."""

    key: str
    kind: str
    """IGNORED, METADATA, or what is wrong: file, caption, image, archive, table, row, key."""
    reason: str


IGNORED = "ignored"
"""Kind of other files among the pairs; counted, but never an error."""
METADATA = "metadata"
"""Kind of file-system metadata; counted, but never an error."""


def make_pair(key: str, image: bytes, suffix: str, caption: bytes, where: str) -> Pair:
    """Build a pair whose split_key is its key."""
    extension = suffix.lower().removeprefix(".")
    if extension in ("jpeg", "jpe", "jfif"):
        extension = "jpg"
    return Pair(
        key=key, image=image, extension=extension, caption=caption, split_key=key, where=where
    )


def unusable(where: str, reason: str, kind: str = "file") -> Unusable:
    """Build a reject whose key is its path."""
    text = printable(where)
    return Unusable(key=text, kind=kind, reason=f"{text} {reason}")


def printable(path: str) -> str:
    """A path as valid UTF-8 text; undecodable bytes are escaped."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def key_of(name: str) -> str:
    """A pair's key from its path: no slashes, no dots, no unprintable characters.

    Different names have different keys: if the name cannot be recovered from the key, a digest of
    the name is appended.
    """
    is_plain = name.isascii() and name.isprintable()
    even = name if is_plain else "".join("_" if is_odd(c) else c for c in name)
    plain = even.replace("/", "__").replace(".", "_")
    if plain.replace("__", "/") == name:
        return plain
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return f"{plain}~{digest}"


def captions_of(text: bytes | None, note: bytes | None) -> bytes | None:
    """The captions from a .txt, or a .json's `caption` or `captions`, one per line; None if none.

    A list of several captions in the .json takes precedence, then a .txt that is not blank.
    """
    noted = _noted(note or b"")
    if len(noted) > 1:
        return joined(noted)
    if text is not None and (is_visible(text.decode("utf-8", "replace")) or not noted):
        return text
    return joined(noted) if noted else None


def _noted(note: bytes) -> list[str]:
    try:
        body = json.loads(note)
        value = body["captions"] if "captions" in body else body["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]
