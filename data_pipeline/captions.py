"""Captions as text: checked, cleaned and lower-cased."""

import unicodedata

from core.errors import InputError

LONGEST = 4096
"""Characters of a caption that are kept."""
MOST_BYTES = 4 * LONGEST
"""Bytes of a caption that are looked at: no character takes more than four."""


def clean_caption(raw: bytes, where: str) -> str:
    """Decode a caption, fold white space and lower its case.

    Raises: InputError if it is not UTF-8 or holds no visible character.
    """
    end = min(len(raw), MOST_BYTES)
    while end < len(raw) and end > MOST_BYTES - 4 and raw[end] & 0xC0 == 0x80:
        end -= 1  # not in the middle of a character
    try:
        text = raw[:end].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the caption of {where} is not UTF-8 (byte {error.start}); convert the file"
        ) from error
    visible = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text[:LONGEST])
    folded = " ".join(visible.split()).lower()
    if not folded:
        raise InputError(f"the caption of {where} is empty; write one")
    return folded
