"""Several data sets in one setting: `A:0.7,B:0.3`, each with its share of every batch."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from core.config import place_problems

_NUMBER = r"\d+/\d+|\d+\.?\d*|\.\d+"
_PART = re.compile(rf"\s*(.+?):({_NUMBER})\s*(?:,|$)")
_NO_NUMBER = re.compile(r":[-+]?[\d.]+(e[-+]?\d+)?%?$")
"""What was meant as a share, and is none: -0.3, 30%, 3e-1."""
_MOST_PARTS = 10**9
"""Largest common denominator of the shares: exact arithmetic in 64 bits."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of a setting."""

    place: str
    """s3://bucket/prefix or a folder."""
    share: Fraction = Fraction(1)
    """Fraction of every batch."""


def data_sets(text: str) -> tuple[DataSet, ...]:
    """The data sets of a setting: one place, or PLACE:SHARE,PLACE:SHARE,...

    A share is what follows the last colon of a part, if it is a number: 0.7, 7/10. A place may
    therefore hold colons, and commas too.
    """
    sets, rest = _parse(text)
    return (DataSet(place=text),) if rest or not sets else sets


def mixture_problems(text: str, setting: str) -> list[str]:
    """Check the form of one place or of a mixture, without any I/O."""
    sets, rest = _parse(text)
    if not sets:
        return place_problems(text, setting)
    if rest:
        return [f"{setting}={text!r}: {rest!r} has no share; write {_example(sets, rest)}"]
    problems = [text for each in sets for text in place_problems(each.place, setting)]
    places = [each.place for each in sets]
    for place in sorted({place for place in places if places.count(place) > 1}):
        problems.append(f"{setting}: {place} is given twice; give it once, with both shares' sum")
    shares = [each.share for each in sets]
    if min(shares) == 0:
        unused = [each.place for each in sets if each.share == 0]
        problems.append(f"{setting}: the share of {', '.join(unused)} is 0; leave it out")
    elif (total := sum(shares, Fraction(0))) != 1:
        right = ",".join(f"{each.place}:{share_text(each.share / total)}" for each in sets)
        odd = next((repr(place) for place in places if "," in place), "")
        one = f"; {odd} was read as one place, since its parts have no numbers as shares"
        problems.append(
            f"{setting}: the shares' sum is {share_text(total)} and must be 1; write {right}"
            f"{one if odd else ''}"
        )
    if math.lcm(*(share.denominator for share in shares)) > _MOST_PARTS:
        problems.append(f"{setting}: the shares have too many digits; write at most 6")
    return problems


def share_text(share: Fraction) -> str:
    """A share as a decimal number if it has at most 6 digits, else as a fraction."""
    whole = share * 10**6
    return f"{float(share):.6f}".rstrip("0").rstrip(".") if whole.denominator == 1 else str(share)


def names_of(places: Sequence[str]) -> list[str]:
    """Short names of data sets: the parts of their places in which they differ."""
    rows = [place.rstrip("/").split("/") for place in places]
    common = 0
    while all(len(row) > common + 1 for row in rows) and len({row[common] for row in rows}) == 1:
        common += 1
    rows = [row[common:] for row in rows]
    while all(len(row) > 1 for row in rows) and len({row[-1] for row in rows}) == 1:
        rows = [row[:-1] for row in rows]
    return ["/".join(row) for row in rows]


def _parse(text: str) -> tuple[tuple[DataSet, ...], str]:
    """The leading parts with a share, and what follows them."""
    sets, at = [], 0
    while (part := _PART.match(text, at)) is not None:
        share = _fraction(part[2])
        if share is None:
            break
        sets.append(DataSet(place=part[1], share=share))
        at = part.end()
    return tuple(sets), text[at:].strip()


def _fraction(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None


def _example(sets: Sequence[DataSet], rest: str) -> str:
    """The setting with a share for the last part, of what the others leave."""
    place = _NO_NUMBER.sub("", rest)
    left = 1 - sum((each.share for each in sets), Fraction(0))
    text = ",".join(f"{each.place}:{share_text(each.share)}" for each in sets)
    return f"{text},{place}:{share_text(left) if left > 0 else 'SHARE'}"
