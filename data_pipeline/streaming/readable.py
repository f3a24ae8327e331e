"""Packed pictures that do not decode: replaced by a fixed rule and counted, never fatal.

`pack` accepts only pictures that decode, so these come from a data set of another version. Training
and validation read the first decodable pair of the split instead: the rule depends on neither ranks
nor batches, so that every mesh reads the same.
"""

from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Any

import cv2
from numpy.typing import NDArray

from core.errors import InputError, no_memory
from core.log import LOG
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.decode import Rgb, decode_rgb
from data_pipeline.streaming.stream import stored_records

_NAMED = 10
"""Maximum pairs that are named in the log; all are counted."""


Crop = Callable[[RawRecord, Rgb], NDArray[Any]]
"""(record, decoded picture) -> picture of one size."""


class ReadablePairs:
    """Decodes and crops pairs, and replaces those that do not decode; any thread may call it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._unreadable: set[str] = set()
        """Pairs that did not decode, also of batches that are made ahead and not used yet."""
        self._passed: set[str] = set()
        self._instead: dict[str, tuple[RawRecord, Rgb]] = {}

    @property
    def passed_over(self) -> int:
        """Number of distinct used pairs that did not decode."""
        return len(self._passed)

    def note_used(self, records: Sequence[RawRecord]) -> None:
        """Count the records among those of batches that were trained on or evaluated."""
        if self._unreadable:
            self._passed |= self._unreadable.intersection(record.key for record in records)

    def decoded(
        self, records: Iterable[RawRecord], source: RawSource, crop: Crop
    ) -> list[tuple[RawRecord, NDArray[Any]]]:
        """Each record, or its replacement, with its picture, cropped by the record's own key.

        Only one picture of full size is held at a time.
        Raises: InputError if no picture of the source decodes, or one cannot be cropped.
        """
        return [self._cropped(record, source, crop) for record in records]

    def _cropped(
        self, record: RawRecord, source: RawSource, crop: Crop
    ) -> tuple[RawRecord, NDArray[Any]]:
        try:
            used, picture = record, decode_rgb(record.image, record.key)
        except InputError as error:
            used, picture = self._other(record, source, error)
        try:
            return used, crop(record, picture)
        except cv2.error as error:
            if no_memory(error):
                raise
            member = f"{used.key}.{used.extension}"
            place = source.member(used.key, member)
            raise InputError(f"{place} cannot be cropped: {error}; leave it out") from error

    def _other(self, record: RawRecord, source: RawSource, error: InputError) -> Any:
        with self._lock:
            if source.fingerprint not in self._instead:
                self._instead[source.fingerprint] = _first_readable(source)
            other = self._instead[source.fingerprint]
            if record.key not in self._unreadable and len(self._unreadable) < _NAMED:
                LOG.warning("%s; %s is read in its place: pack again", error, other[0].key)
            self._unreadable.add(record.key)
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
