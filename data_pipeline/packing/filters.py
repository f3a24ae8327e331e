"""The paper's filters for raw pairs, and for exact and near duplicates; each one is optional.

Source: arXiv 2102.12092, section 3.1 and appendix C: captions that are too short, not English or
boilerplate, and images of an aspect ratio outside of [1/2, 2] are left out.
"""

import re
from dataclasses import dataclass

from data_pipeline.config import FilterConfig
from data_pipeline.images.decode import (
    Inspected,
)
from data_pipeline.text.language import is_english

_BOILERPLATE = re.compile(
    r"photographed (on|in|at) .*\d|\bstock (photo|image|picture|vector|footage)|image may contain"
    r"|\bclick (here|to)\b|all rights reserved|©|\.(jpe?g|png|gif|webp)$"
    r"|^(img|dsc|dscn|image|photo|picture|screenshot|untitled)[ _-]*\d*$"
)


@dataclass(frozen=True, kw_only=True)
class Reject:
    """Why a pair is left out."""

    kind: str
    reason: str


def caption_reject(caption: str, config: FilterConfig) -> Reject | None:
    """Apply the caption filters to a cleaned caption."""
    words = caption.split()
    if len(words) < config.min_words:
        return Reject(
            kind="short", reason=f"{len(words)} words, min_words={config.min_words}: {caption!r}"
        )
    if config.english and not is_english(caption):
        return Reject(kind="language", reason=f"not English: {caption[:200]!r}")
    if config.boilerplate and _BOILERPLATE.search(caption):
        return Reject(kind="boilerplate", reason=f"boilerplate: {caption[:200]!r}")
    return None


def image_reject(image: Inspected, config: FilterConfig) -> Reject | None:
    """Apply the size filters to a picture."""
    short, long = sorted((image.width, image.height))
    if short < config.min_side:
        return Reject(
            kind="small", reason=f"{image.width}x{image.height}, min_side={config.min_side}"
        )
    if config.aspect and long > config.aspect * short:
        return Reject(
            kind="aspect", reason=f"{image.width}x{image.height}, aspect={config.aspect:g}"
        )
    return None
