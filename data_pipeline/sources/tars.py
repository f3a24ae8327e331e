"""Pairs from WebDataset tars: adjacent KEY.jpg|png|webp and KEY.txt, or KEY.json with `caption`.

WebDataset's keys end at the first dot of a name, but users' names may contain dots
(`clip v1.5 0001.jpg`). Members with equal names up to the first dot form a group. Each picture with
a caption of the same name up to the last dot is a pair; other members of its group (`KEY.mask.png`,
`KEY.cls.txt`) are further fields of the sample. Every member is in a pair or a reject.
"""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import PurePosixPath
from typing import IO, Any

from core.errors import TapirError
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
from data_pipeline.sources.pair import (
    IGNORED,
    METADATA,
    Pair,
    Unusable,
    captions_of,
    key_of,
    make_pair,
    unusable,
)

_ENDED = "has_ended"
_BUFFER = 2**16
_PACKED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_NEIGHBOURS = (
    "members of a pair must be neighbours in the archive (a picture and a .txt of one name): make "
    "it with tar --sort=name"
)


def tar_pairs(file: IO[bytes], where: str, archive: str) -> Iterator[Pair | Unusable]:
    """Yield the pairs of a tar, which may be several concatenated ones; reads it once.

    Links, paths that leave the archive, members over the size limit and a broken archive are
    rejects. Keys begin with `archive`.
    """
    try:
        with _opened(file) as tar:
            yield from _members(tar, where, archive)
            if not getattr(tar, _ENDED, False):
                raise tarfile.ReadError(f"no end mark at {tar.offset}")
    except (MemoryError, TapirError):
        raise
    except Exception as error:  # tarfile raises nearly anything for damaged archives
        reason = f"is not a whole tar archive: {error}; what comes after that is lost"
        yield unusable(where, reason, "archive")


@contextmanager
def _opened(raw: IO[bytes]) -> Iterator[tarfile.TarFile]:
    head = raw.read(6)
    raw.seek(0)
    opener = next((opener for magic, opener in _PACKED.items() if head.startswith(magic)), None)
    with (
        opener(raw, "rb") if opener else nullcontext(raw) as file,
        tarfile.open(
            fileobj=file, mode="r|", tarinfo=_Header, ignore_zeros=True, bufsize=_BUFFER
        ) as tar,  # tarfile's own decompression stops at the first part
    ):
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


def _members(tar: tarfile.TarFile, path: str, archive: str) -> Iterator[Pair | Unusable]:
    group = _Group(path, archive, "")
    try:
        for member in tar:
            name = PurePosixPath(member.name)
            where, extension = f"{path}:{member.name}", extension_of(name.name)
            reject = _refused(member, name, where)
            if reject is not None:
                yield reject
            elif member.isfile() and (is_picture(name.name) or extension in (CAPTION, NOTE)):
                stem = name.with_suffix("").as_posix()
                if not group.has(stem):
                    yield from group.end()
                    group = _Group(path, archive, stem)
                yield from group.add(stem, extension, *_content(tar, member, where, extension))
    except Exception:
        yield from (item for item in group.end() if isinstance(item, Pair))
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


class _Sample:
    """Members of one name, by extension; None for a member that is already rejected."""

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.parts: dict[str, bytes | None] = {}

    @property
    def pictures(self) -> list[str]:
        """Extensions of its supported pictures."""
        return [e for e, data in self.parts.items() if e in EXTENSIONS and data is not None]

    @property
    def caption(self) -> bytes | None:
        return captions_of(self.parts.get(CAPTION), self.parts.get(NOTE))


class _Group:
    """Adjacent members with equal names up to the first dot.

    `_open` is a stack of incomplete samples: each name extends the one before, as `7.mask` extends
    `7`.
    """

    def __init__(self, path: str, archive: str, stem: str) -> None:
        self._path, self._archive, self._key = path, archive, _first_part(stem)
        self._open: list[_Sample] = []
        self._pairs: set[str] = set()
        self._left: list[tuple[str, str, bool]] = []
        """(name, extension, has a .json) of members without a pair."""

    def has(self, stem: str) -> bool:
        """True if a name belongs to this group."""
        return self._key == _first_part(stem)

    def add(
        self, stem: str, extension: str, data: bytes | None, reject: Unusable | None
    ) -> Iterator[Pair | Unusable]:
        """Add a member; yields the pairs and rejects that are complete."""
        while self._open and not f"{stem}.".startswith(f"{self._open[-1].stem}."):
            yield from self._close(self._open.pop())
        if not self._open or self._open[-1].stem != stem:
            self._open.append(_Sample(stem))
        if extension in self._open[-1].parts:  # the same name again
            yield from self._close(self._open.pop())
            self._open.append(_Sample(stem))
        self._open[-1].parts[extension] = data
        if reject is not None:
            yield reject

    def end(self) -> Iterator[Pair | Unusable]:
        """Yield the remaining pairs and rejects."""
        while self._open:
            yield from self._close(self._open.pop())
        for stem, extension, noted in self._left:
            where = f"{self._path}:{stem}.{extension}"
            if extension == NOTE or self._is_field(stem):
                yield unusable(where, "is a further field, or a note without a pair", IGNORED)
            elif extension == CAPTION:
                yield unusable(where, f"is a caption without a picture; {_NEIGHBOURS}", "image")
            elif noted:
                yield unusable(where, "has no caption: no .txt, and its .json has none", "caption")
            else:
                yield unusable(where, f"has no caption; {_NEIGHBOURS}", "caption")

    def _is_field(self, stem: str) -> bool:
        """True if the name, cut at one of its dots, is the name of a pair of this group."""
        dots = (i for i, letter in enumerate(stem) if letter == ".")
        return any(stem[:i] in self._pairs for i in dots)

    def _close(self, sample: _Sample) -> Iterator[Pair | Unusable]:
        """Yield a sample as a pair, or record its members as without a pair."""
        pictures, caption = sample.pictures, sample.caption
        where = f"{self._path}:{sample.stem}"
        if pictures and caption is not None:
            self._pairs.add(sample.stem)
            key = key_of(f"{self._archive}/{sample.stem}")
            data = sample.parts[pictures[0]] or b""
            yield make_pair(key, data, pictures[0], caption, where)
            for extension in pictures[1:]:
                yield unusable(
                    f"{where}.{extension}", "is a second picture of one caption", "image"
                )
        elif None not in sample.parts.values():  # else its picture is a reject already
            noted = NOTE in sample.parts
            self._left += [(sample.stem, extension, noted) for extension in sample.parts]


def _first_part(stem: str) -> str:
    """WebDataset's key: the path up to the first dot of the name."""
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.partition(".")[0]
