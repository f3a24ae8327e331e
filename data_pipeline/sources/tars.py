"""Pairs from WebDataset tars: adjacent KEY.jpg|png|webp and KEY.txt, or KEY.json with `caption`.

Every member is in a pair or a reject; tar_groups.py says which members are a pair. Archives are
read from any stream; sets in place read ranges of them again (`run_pairs`).
"""

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

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
from data_pipeline.sources.tar_reader import Readable, TarReader

HEAD = 6
"""Bytes that tell how an archive is compressed."""
_HARMLESS = {"comment"}
"""Global PAX headers that change no member."""
_PLAIN = re.compile(rf"([\w-]+)\.({'|'.join((*EXTENSIONS, CAPTION, NOTE))})", re.ASCII)
"""Names of most members, for which no path has to be parsed: (stem, extension)."""
_PACKED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


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
        tar = TarReader(_unpacked(stream, in_place))
        yield from _members(tar, where, archive, in_place)
        if not tar.has_ended:
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
        tar = TarReader(io.BytesIO(padded))
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


def _unpacked(stream: Readable, plain: bool) -> Readable:
    """The bytes of a tar; `plain` refuses a compressed one."""
    head = b""
    while len(head) < HEAD and (part := stream.read(HEAD - len(head))):
        head += part
    whole: Any = _Rejoined(head, stream)
    opener = _opener(head)
    if opener is None:
        return whole  # type: ignore[no-any-return]
    if plain:
        raise tarfile.ReadError("it is compressed, and cannot be read in place")
    return opener(whole, "rb")  # type: ignore[no-any-return]  # tarfile's own stops at a part's end


def _members(tar: TarReader, where: str, archive: str, in_place: bool = False) -> Iterator[Item]:
    group = Group(where, archive, "")
    try:
        while (member := tar.next()) is not None:
            stem, extension, reject = _named(member, where)
            if in_place and tar.pax_headers.keys() - _HARMLESS:
                raise tarfile.ReadError("a global PAX header changes its members: pack it copied")
            if reject is not None:
                yield reject
            elif stem:
                if not group.has(stem):
                    yield from group.end()
                    group = Group(where, archive, stem)
                end = tar.offset
                content = _content(tar, member, where, extension)
                yield from group.add(stem, extension, *content, Run(member.offset, end))
    except Exception:
        yield from (item for item in group.end() if not isinstance(item, Unusable))
        raise
    yield from group.end()


def _named(member: tarfile.TarInfo, where: str) -> tuple[str, str, Unusable | None]:
    """(path without its extension, extension, reject); neither a path nor a reject for folders."""
    plain = _PLAIN.fullmatch(member.name) if member.isfile() else None
    if plain is not None:
        return plain[1], plain[2], None
    name = PurePosixPath(member.name)
    reject, extension = _refused(member, name, f"{where}:{member.name}"), extension_of(name.name)
    if reject is not None or not member.isfile():
        return "", "", reject
    return name.with_suffix("").as_posix(), extension, None


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
    tar: TarReader, member: tarfile.TarInfo, where: str, extension: str
) -> tuple[bytes | None, Unusable | None]:
    """(bytes, None) of a member, or (None, reject)."""
    at = f"{where}:{member.name}"
    if extension not in (*EXTENSIONS, CAPTION, NOTE):
        kind, reason = why_not_read(member.name)
        return None, unusable(at, reason, kind)
    if member.size > MOST_BYTES and extension in EXTENSIONS:
        return None, unusable(at, f"has {member.size} bytes; the limit is {MOST_BYTES}")
    most = MOST_BYTES if extension in EXTENSIONS else MOST_CAPTION_BYTES
    return tar.content(member, most), None
