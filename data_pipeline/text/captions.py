"""Caption clean-up: checks, a fixed character table, lower case.

The table covers control characters and white space only. Python's Unicode tables change between
versions and are not used, so that equal bytes give equal captions everywhere. Joiners (ZWJ, ZWNJ),
direction marks, variation selectors, tags and private-use characters are kept.
"""

import re
import unicodedata
from itertools import groupby

from core.errors import InputError

LONGEST = 4096
"""Maximum characters of a caption; the rest is cut."""
MOST_BYTES = 4 * LONGEST
"""Maximum bytes of a caption that are read: a character has at most four."""
MOST_CAPTIONS = 64
"""Maximum captions of a picture; further ones are dropped."""

_CONTROL = [*range(0x20), *range(0x7F, 0xA0)]
_SPACES = [0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
_REMOVED = [0xAD, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""Soft hyphens, byte order marks, and bidirectional controls."""
_TABLE = {**dict.fromkeys(_CONTROL + _SPACES, " "), **dict.fromkeys(_REMOVED, "")}
_ODD = frozenset(map(chr, [*_CONTROL, *_REMOVED, 0x2028, 0x2029]))
_INVISIBLE = re.compile(
    "[ \u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2060-\u2065\u206a-\u206f"
    "\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]+"
)
"""Kept characters that do not make a caption visible."""
_LINES = re.compile("\r\n|\n|\r")


def clean_caption(raw: bytes, where: str) -> str:
    """Decode a caption, fold white space and lower its case.

    Raises: InputError if it is not UTF-8 or holds no visible character.
    """
    return _cleaned(_decoded(raw, MOST_BYTES, where), where)


def clean_captions(raw: bytes, where: str) -> tuple[str, ...]:
    """The distinct, cleaned captions of a picture, from one per line.

    Raises: InputError if they are not UTF-8 or hold no visible character.
    """
    lines = _LINES.split(_decoded(raw, MOST_CAPTIONS * MOST_BYTES, where))
    captions = [_cleaned(line, where) for line in lines if is_visible(line)]
    return tuple(dict.fromkeys(captions[:MOST_CAPTIONS])) or (_cleaned("", where),)


def joined(captions: list[str]) -> bytes:
    """Encode captions for `clean_captions`: one per line; line ends in a caption become spaces."""
    return "\n".join(_LINES.sub(" ", text) for text in captions).encode("utf-8", "surrogatepass")


def is_visible(text: str) -> bool:
    """True if a text has a visible character."""
    return bool(_INVISIBLE.sub("", text.translate(_TABLE)))


def lowered(text: str) -> str:
    """Lower-case the letters of Unicode 3.2, a table that is the same in every Python."""
    if text.isascii():
        return text.lower()
    runs = groupby(text, lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")
    return "".join("".join(run).lower() if known else "".join(run) for known, run in runs)


def is_odd(character: str) -> bool:
    """True for characters that names must not contain: controls, line ends, lone surrogates."""
    return character in _ODD or 0xD800 <= ord(character) < 0xE000


def _decoded(raw: bytes, most: int, where: str) -> str:
    end = min(len(raw), most)
    while end < len(raw) and end > most - 4 and raw[end] & 0xC0 == 0x80:
        end -= 1  # not in the middle of a character
    try:
        return raw[:end].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the caption of {where} is not UTF-8 (byte {error.start}); convert the file"
        ) from error


def _cleaned(text: str, where: str) -> str:
    words = text[:LONGEST].translate(_TABLE).split(" ")
    folded = lowered(" ".join(filter(None, words)))
    if not is_visible(folded):
        raise InputError(f"the caption of {where} is empty; write one")
    return folded
