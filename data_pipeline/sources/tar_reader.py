"""Reads the members of a tar as a stream: plain files here, everything else by Python's tarfile.

tarfile takes a tenth of a millisecond a member, and copies what it has read ahead at each read. A
header with nothing but what writers of data sets put into it (`_FIELDS`) is parsed here. At every
other one (a first member, long names, links, sparse files, damage, end marks) tarfile continues at
its offset. What is parsed here is what tarfile would parse, so that each archive ends as it does by
tarfile alone.

A pax header that holds times alone is passed over: webdataset and img2dataset write one before each
file, since they give its time as a fraction.
"""

import re
import tarfile
from collections.abc import Mapping
from typing import Any, Protocol
from zlib import adler32

_PART = 2**17
"""Bytes of a read."""
_BLOCK = tarfile.BLOCKSIZE
_FIELDS = re.compile(
    rb"(?:[0-7]{7}[\0 ]|[0-7]{6} \0){3}"  # mode, user, group
    rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]"  # size, time
    rb"([0-7]{6})\0 ([0x])"  # checksum, type: a file, or a pax header for the next one
    rb".{172}(?:[0-7]{7}[\0 ]|[0-7]{6} \0|\0{8}){2}"  # link, magic, owner, device
    rb"(.{155}).{12}",  # prefix of the name
    re.DOTALL,
)
_NAME, _FIRST = 100, 100
"""Length of the name; offset of _FIELDS."""
_CHECKSUM = slice(148, 156)
_TIME = re.compile(rb"(\d+) [amc]time=[\d.]+\n")


class Readable(Protocol):
    """A binary stream; it need not be seekable."""

    def read(self, size: int = -1, /) -> bytes:
        """Read at most `size` bytes; none at the end."""


class Header(tarfile.TarInfo):
    """Continues after an end mark, as in concatenated tars, but not after a damaged header."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "Header":
        try:
            header = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            setattr(archive, _ENDED, True)
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a damaged header at {archive.offset}: {error}") from error
        setattr(archive, _ENDED, False)
        return header


_ENDED = "has_ended"
"""Attribute of a TarFile: the last header was an end mark."""


class TarReader:
    """The members of a plain tar, in order."""

    def __init__(self, stream: Readable) -> None:
        """Raises: tarfile.ReadError if it does not begin with a header; what `stream` raises."""
        self._window = _Window(stream)
        window: Any = self._window
        self._tar = tarfile.TarFile(fileobj=window, tarinfo=Header, ignore_zeros=True)
        self._is_first = True

    @property
    def offset(self) -> int:
        """Where the next header is."""
        return self._tar.offset

    @property
    def has_ended(self) -> bool:
        """True if an end mark is the last header so far."""
        return bool(getattr(self._tar, _ENDED, False))

    @property
    def pax_headers(self) -> Mapping[str, str]:
        """The global ones."""
        return self._tar.pax_headers

    def next(self) -> tarfile.TarInfo | None:
        """The next member; None at the end.

        Raises: what tarfile and the stream raise, for damaged archives nearly anything.
        """
        member = None if self._is_first or self._tar.pax_headers else self._plain()
        if member is None:
            member = self._tar.next()
            self._tar.members.clear()  # type: ignore[attr-defined]  # else memory grows
        self._is_first = False
        return member

    def content(self, member: tarfile.TarInfo, most: int) -> bytes:
        """The bytes of the file that `next` has returned, and of a longer one the first `most`."""
        if member.size <= most and member.sparse is None:  # type: ignore[attr-defined]
            end = member.offset_data + member.size
            data = self._window.ahead(member.offset_data, end)
            if len(data) == member.size:
                return data
        file = self._tar.extractfile(member)
        assert file is not None
        return file.read(-1 if member.size <= most else most)

    def _plain(self) -> tarfile.TarInfo | None:
        """The next member if it is a file with a plain header; None leaves it to tarfile."""
        first = at = self._tar.offset
        if at < self._window.tell():
            return None
        if at > self._window.tell():
            self._window.seek(at - 1)  # as tarfile does
        kind, name, size = self._parsed(at)
        if kind == tarfile.XHDTYPE and size <= _BLOCK and self._holds_times(at + _BLOCK, size):
            at += 2 * _BLOCK
            kind, name, size = self._parsed(at)
        if kind != tarfile.REGTYPE:
            return None
        member = Header(name)
        member.size, member.offset, member.offset_data = size, first, at + _BLOCK
        self._tar.offset = member.offset_data + -(-size // _BLOCK) * _BLOCK
        return member

    def _parsed(self, at: int) -> tuple[bytes, str, int]:
        """(type, name, size) of a plain header; (b"", "", 0) for another one."""
        header = self._window.ahead(at, at + _BLOCK)
        fields = _FIELDS.fullmatch(header, _FIRST)
        if fields is None or not header.isascii():
            return b"", "", 0
        size, checksum, kind, prefix = fields.groups()
        # 512 ASCII bytes: their sum is less than adler32's modulus
        total = (adler32(header) & 0xFFFF) - 1
        if total - sum(header[_CHECKSUM]) + 8 * ord(" ") != int(checksum, 8):
            return b"", "", 0
        name = _text(header[:_NAME])
        if folder := _text(prefix):
            name = f"{folder}/{name}"
        return kind, name, int(size, 8)

    def _holds_times(self, at: int, size: int) -> bool:
        """True if the records of a pax header are times."""
        block = self._window.ahead(at, at + _BLOCK)
        place = 0
        while place < size:
            record = _TIME.match(block, place)
            if record is None or int(record[1]) != record.end() - place:
                return False
            place = record.end()
        return place == size and not block[size:].strip(b"\0")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii")


class _Window:
    """A stream as a file that tarfile reads forwards; what lies ahead may be looked at."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._at = 0
        self._held, self._start = b"", 0
        """Bytes that are held, and the offset of the first."""
        self._error: Exception | None = None
        """Of the stream: raised when a byte is read that it has not delivered."""

    def ahead(self, start: int, end: int) -> bytes:
        """The bytes of a range behind the position; fewer if the stream ends or fails before."""
        if end > self._end:
            try:
                self._fill(end)
            except Exception as error:
                self._error = error
        first = start - self._start
        return self._held[first : first + end - start]

    def tell(self) -> int:
        """The position."""
        return self._at

    def seek(self, position: int) -> int:
        """Move forwards, at most to the end; raises tarfile.StreamError for other moves."""
        if position < self._at:
            raise tarfile.StreamError("seeking backwards is not allowed")
        while (end := self._end) < position:
            self._at = end
            self._fill(end + 1)
            if self._end == end:
                break
        self._at = min(position, self._end)
        return self._at

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end.

        A negative size, of a damaged header, leaves as many of the held bytes, as in tarfile.
        """
        self._fill(self._at + size)
        first = self._at - self._start
        end = first + size if size >= 0 else max(len(self._held) + size, first)
        data = self._held[first:end]
        self._at += len(data)
        return data

    @property
    def _end(self) -> int:
        return self._start + len(self._held)

    def _fill(self, end: int) -> None:
        """Hold the bytes from the position to an offset."""
        missing = end - self._end
        if missing <= 0:
            return
        if self._error is not None:
            raise self._error
        parts = [self._held[self._at - self._start :]]
        try:
            while missing > 0 and (part := self._stream.read(_PART)):
                parts.append(part)
                missing -= len(part)
        finally:
            self._start, self._held = self._at, b"".join(parts)
