"""Pairs from WebDataset tars: adjacent KEY.jpg|png|webp and KEY.txt, or KEY.json with `caption`.

Every member is in a pair or a reject; tar_groups.py says which members are a pair. Archives are
read from any stream; sets in place read ranges of them again (`run_pairs`).
"""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, Protocol

from core.errors import CorruptError, TapirError
from data_pipeline.images.crops import EXTENSIONS
from data_pipeline.sources.files import MOST_BYTES, MOST_CAPTION_BYTES
from data_pipeline.sources.names import (
    CAPTION,
    IS_METADATA,
    NOTE,
    extension_of,
    is_metadata,
    is_picture,
    why_not_read,
)
from data_pipeline.sources.pair import METADATA, Pair, Unusable, unusable
from data_pipeline.sources.tar_groups import Group, Item, Run

HEAD = 6
"""Bytes that tell how an archive is compressed."""
_PART = 2**17
"""Bytes of a read."""
_ENDED = "has_ended"
_HARMLESS = {"comment"}
"""Global PAX headers that change no member."""
_PACKED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


class Readable(Protocol):
    """A binary stream; it need not be seekable."""

    def read(self, size: int = -1, /) -> bytes:
        """Read at most `size` bytes; none at the end."""


def archive_pairs(stream: Readable, where: str, archive: str) -> Iterator[Pair | Unusable]:
    """Yield the pairs of a tar, plain or compressed; their keys begin with `archive`.

    Links, paths that leave the archive, members over the size limit and broken archives are
    rejects.
    """
    return (item for item in archive_items(stream, where, archive) if not isinstance(item, Run))


def archive_items(
    stream: Readable, where: str, archive: str, in_place: bool = False
) -> Iterator[Item]:
    """Yield the pairs, rejects and runs of a tar.

    `in_place`: an archive whose runs cannot be read by themselves is a reject.
    """
    try:
        with _opened(stream, in_place) as tar:
            yield from _members(tar, where, archive, in_place)
            if not getattr(tar, _ENDED, False):
                raise tarfile.ReadError(f"no end mark at {tar.offset}")
    except (MemoryError, TapirError):
        raise
    except Exception as error:  # tarfile raises nearly anything for damaged archives
        yield _broken(where, error)


def run_pairs(data: bytes, where: str, archive: str) -> list[Pair]:
    """The pairs of some consecutive runs of a plain tar.

    Raises: CorruptError if the bytes are no members of a tar.
    """
    padded = data + bytes(-len(data) % tarfile.BLOCKSIZE)
    try:
        with tarfile.open(
            fileobj=io.BytesIO(padded), mode="r:", tarinfo=_Header, ignore_zeros=True
        ) as tar:
            return [item for item in _members(tar, where, archive) if isinstance(item, Pair)]
    except (tarfile.TarError, ValueError) as error:
        raise CorruptError(f"a part of {where} is not a part of a tar: {error}") from error


def _broken(where: str, error: Exception) -> Unusable:
    reason = f"is not a whole tar archive: {error}; what comes after that is lost"
    return unusable(where, reason, "archive")


def is_compressed(head: bytes) -> bool:
    """True for an archive that begins with these HEAD bytes, and is compressed."""
    return _opener(head) is not None


def _opener(head: bytes) -> Callable[..., Any] | None:
    return next((o for magic, o in _PACKED.items() if head.startswith(magic)), None)


class _Rejoined:
    """A stream with the bytes that were read from its start."""

    def __init__(self, head: bytes, rest: Readable) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int = -1) -> bytes:
        if not self._head:
            return self._rest.read(size)
        part = self._head if size < 0 else self._head[:size]
        self._head = self._head[len(part) :]
        return part if size >= 0 else part + self._rest.read()


@contextmanager
def _opened(stream: Readable, plain: bool) -> Iterator[tarfile.TarFile]:
    head = b""
    while len(head) < HEAD and (part := stream.read(HEAD - len(head))):
        head += part
    whole: Any = _Rejoined(head, stream)
    opener = _opener(head)
    if opener is not None:  # tarfile's own stop at the first part
        if plain:
            raise tarfile.ReadError("it is compressed, and cannot be read in place")
        whole = opener(whole, "rb")
    with tarfile.open(
        fileobj=whole, mode="r|", tarinfo=_Header, ignore_zeros=True, bufsize=_PART
    ) as tar:
        yield tar


class _Header(tarfile.TarInfo):
    """Continues after an end mark, as in concatenated tars, but not after a damaged header."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
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


def _members(
    tar: tarfile.TarFile, where: str, archive: str, in_place: bool = False
) -> Iterator[Item]:
    group = Group(where, archive, "")
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else memory grows
            name = PurePosixPath(member.name)
            at, extension = f"{where}:{member.name}", extension_of(name.name)
            reject = _refused(member, name, at)
            if in_place and tar.pax_headers.keys() - _HARMLESS:
                raise tarfile.ReadError("a global PAX header changes its members: pack it copied")
            if reject is not None:
                yield reject
            elif member.isfile() and (is_picture(name.name) or extension in (CAPTION, NOTE)):
                stem = name.with_suffix("").as_posix()
                if not group.has(stem):
                    yield from group.end()
                    group = Group(where, archive, stem)
                end = tar.offset
                content = _content(tar, member, at, extension)
                yield from group.add(stem, extension, *content, Run(member.offset, end))
    except Exception:
        yield from (item for item in group.end() if not isinstance(item, Unusable))
        raise
    yield from group.end()


def _refused(member: tarfile.TarInfo, name: PurePosixPath, where: str) -> Unusable | None:
    """The reject of a member that can be no part of a pair; None for folders."""
    if name.is_absolute() or ".." in name.parts or member.issym() or member.islnk():
        return unusable(where, "is a link or leaves the archive; such members are refused")
    if member.isdir():
        return None
    if is_metadata(name):
        return unusable(where, IS_METADATA, METADATA)
    if not member.isfile():
        return unusable(where, "is not a plain file")
    if is_picture(name.name) or extension_of(name.name) in (CAPTION, NOTE):
        return None
    kind, reason = why_not_read(name.name)
    return unusable(where, reason, kind)


def _content(
    tar: tarfile.TarFile, member: tarfile.TarInfo, where: str, extension: str
) -> tuple[bytes | None, Unusable | None]:
    """(bytes, None) of a member, or (None, reject)."""
    if extension not in (*EXTENSIONS, CAPTION, NOTE):
        kind, reason = why_not_read(member.name)
        return None, unusable(where, reason, kind)
    if member.size > MOST_BYTES and extension in EXTENSIONS:
        return None, unusable(where, f"has {member.size} bytes; the limit is {MOST_BYTES}")
    size = -1 if extension in EXTENSIONS else MOST_CAPTION_BYTES
    return tar.extractfile(member).read(size), None  # type: ignore[union-attr]
