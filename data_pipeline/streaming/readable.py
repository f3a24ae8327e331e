"""Packed pictures that do not decode: replaced by a fixed rule and counted, never fatal.

`pack` accepts only pictures that decode, so these come from a data set of another version. Training
and validation read the first decodable pair of the split instead: the rule depends on neither ranks
nor batches, so that every mesh reads the same.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from core.errors import InputError
from core.log import LOG
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.decode import Rgb, decode_rgb
from data_pipeline.streaming.stream import stored_records

_NAMED = 10
"""Maximum pairs that are named in the log; all are counted."""


class ReadablePairs:
    """Decodes pairs, and replaces those that do not decode."""

    def __init__(self) -> None:
        self._passed: set[str] = set()
        self._instead: dict[int, tuple[RawRecord, Rgb]] = {}

    @property
    def passed_over(self) -> int:
        """Number of distinct pairs that did not decode."""
        return len(self._passed)

    def decoded(
        self, records: Iterable[RawRecord], source: RawSource
    ) -> list[tuple[RawRecord, Rgb]]:
        """Each record, or its replacement, with its decoded picture.

        Raises: InputError if no picture of the source decodes.
        """
        pairs = []
        for record in records:
            try:
                pairs.append((record, decode_rgb(record.image, record.key)))
            except InputError as error:
                pairs.append(self._other(record, source, error))
        return pairs

    def _other(self, record: RawRecord, source: RawSource, error: InputError) -> Any:
        if id(source) not in self._instead:
            self._instead[id(source)] = _first_readable(source)
        other = self._instead[id(source)]
        if record.key not in self._passed and len(self._passed) < _NAMED:
            LOG.warning("%s; %s is read in its place: pack again", error, other[0].key)
        self._passed.add(record.key)
        return other


def _first_readable(source: RawSource) -> tuple[RawRecord, Rgb]:
    for record in stored_records(source):
        try:
            return record, decode_rgb(record.image, record.key)
        except InputError:
            continue
    raise InputError("no picture of a split can be decoded; make the data set again: tapir pack")


def readable(records: Sequence[RawRecord]) -> list[RawRecord]:
    """The records whose pictures decode; warns about the others."""
    good, bad = split_readable(records)
    if bad:
        LOG.warning("%d of %d pairs are left out: %s", len(bad), len(records), bad[0][1])
    return [record for record, _ in good]


def split_readable(
    records: Iterable[RawRecord],
) -> tuple[list[tuple[RawRecord, Rgb]], list[tuple[RawRecord, InputError]]]:
    """(records with decoded pictures, undecodable records with the error)."""
    good: list[tuple[RawRecord, Rgb]] = []
    bad: list[tuple[RawRecord, InputError]] = []
    for record in records:
        try:
            good.append((record, decode_rgb(record.image, record.key)))
        except InputError as error:
            bad.append((record, error))
    return good, bad
