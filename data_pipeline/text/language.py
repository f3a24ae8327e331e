"""A cheap guess of a caption's language: English by letters and common words, else its script.

It costs microseconds a caption and no model: other languages in Latin letters are all `latin`.
"""

import re
from bisect import bisect_right
from collections import Counter

_ENGLISH = (
    "a an the of in on at to for from with and or is are was be by as it its this that these his "
    "her their my your near under over above below between behind into up down out off about left "
    "right two three four"
)
_COMMON = frozenset(_ENGLISH.split())
_LONG = 6
"""Captions with at least this many words must contain one of _ENGLISH."""
_LATIN = 0.9
_WORD = re.compile(r"[a-z]+")
_SAMPLE = 200
"""Characters of a caption that its script is guessed from."""
NONE, ENGLISH, OTHER = "none", "en", "other"
_SCRIPTS = (
    *((0x41, "latin"), (0x250, OTHER), (0x370, "greek"), (0x400, "cyrillic"), (0x530, "armenian")),
    *((0x590, "hebrew"), (0x600, "arabic"), (0x700, OTHER), (0x900, "devanagari")),
    *((0x980, "bengali"), (0xA00, OTHER), (0xB80, "tamil"), (0xC00, "telugu"), (0xC80, OTHER)),
    *((0xE00, "thai"), (0xE80, OTHER), (0x10A0, "georgian"), (0x1100, "hangul"), (0x1200, OTHER)),
    *((0x1E00, "latin"), (0x1F00, "greek"), (0x2000, OTHER), (0x3040, "kana"), (0x3100, OTHER)),
    *((0x3130, "hangul"), (0x3190, OTHER), (0x3400, "han"), (0xA000, OTHER), (0xAC00, "hangul")),
    *((0xD7B0, OTHER), (0xF900, "han"), (0xFB00, OTHER), (0x20000, "han"), (0x323B0, OTHER)),
)
"""(first code point, script): a fixed table, since Python's own changes between versions."""
_STARTS = [start for start, _ in _SCRIPTS]


def is_english(caption: str) -> bool:
    """Heuristic: letters are a-z, and a long caption has one of the commonest English words."""
    words = _WORD.findall(caption)
    if len(words) >= _LONG and _COMMON.isdisjoint(words):
        return False
    if words and caption.isascii():
        return True
    letters = [c for c in caption if c.isalpha()]
    latin = sum(c.isascii() for c in letters)
    return bool(letters) and latin >= _LATIN * len(letters)


def guess_language(caption: str) -> str:
    """`en`, else the commonest script of its letters; `none` without letters.

    Japanese is `kana` if a fifth of its letters are kana, though most are Chinese characters.
    """
    if is_english(caption):
        return ENGLISH
    scripts = Counter(_script(c) for c in caption[:_SAMPLE] if c.isalpha())
    if not scripts:
        return NONE
    if scripts["kana"] * 5 >= scripts.total():
        return "kana"
    return max(scripts, key=lambda name: (scripts[name], name))


def _script(letter: str) -> str:
    return _SCRIPTS[bisect_right(_STARTS, ord(letter)) - 1][1]
