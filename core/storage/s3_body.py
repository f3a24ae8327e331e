"""Bodies of S3 requests and answers: streams of parts, and ranges that a store may ignore."""

import io
import re
from collections.abc import Iterable
from typing import Any

from botocore.exceptions import IncompleteReadError

from core.errors import StoreError

_CHUNK = 2**20


def read_into(parts: list[bytes], answer: Any, where: str, start: int, length: int | None) -> None:
    """Append the requested bytes of a GET to `parts`; bytes before an error stay there.

    Raises: IncompleteReadError for a truncated body; StoreError for another range.
    """
    first, expected = _place_of(where, answer, start)
    body = answer["Body"]
    _skip(body, start - first)
    if expected is not None:
        expected = max(0, expected - (start - first))
    if length is not None:
        expected = length if expected is None else min(expected, length)
    got = 0
    for chunk in body.iter_chunks(_CHUNK):
        kept = chunk if length is None else chunk[: length - got]
        parts.append(kept)
        got += len(kept)
        if got == length:
            return
    if expected is not None and got < expected:
        raise IncompleteReadError(actual_bytes=got, expected_bytes=expected)


def _place_of(where: str, answer: Any, start: int) -> tuple[int, int | None]:
    """(offset, count) of the bytes of an answer; the count is None if it is not given."""
    size = answer.get("ContentLength")
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
        return 0, size  # the whole object: some stores ignore ranges
    place = re.fullmatch(r"bytes (\d+)-(\d+)/.*", str(answer.get("ContentRange", "")))
    if place is None:
        return start, size
    first, last = int(place[1]), int(place[2])
    if first != start:
        raise StoreError(f"{where}: asked from byte {start}, the store answers from {first}")
    return first, last - first + 1


def _skip(body: Any, count: int) -> None:
    while count > 0 and (dropped := body.read(min(count, _CHUNK))):
        count -= len(dropped)


class PartStream(io.RawIOBase):
    """A readable file of concatenated byte strings."""

    def __init__(self, parts: Iterable[bytes | memoryview]) -> None:
        self._parts = iter(parts)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part).cast("B")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
