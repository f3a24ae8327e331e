"""Pairs of pictures with .txt or .json captions, each a file of its own."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from data_pipeline.images.crops import EXTENSIONS
from data_pipeline.sources.names import (
    CAPTION,
    NOTE,
    extension_of,
    is_picture,
    is_tar,
    why_not_read,
)
from data_pipeline.sources.pair import (
    IGNORED,
    Pair,
    Unusable,
    captions_of,
    key_of,
    make_pair,
    unusable,
)
from data_pipeline.sources.places import Files, Folder
from data_pipeline.text.captions import MOST_BYTES as CAPTION_BYTES
from data_pipeline.text.captions import MOST_CAPTIONS

MOST_BYTES = 64 * 2**20
"""Maximum size of a picture or archive member; larger ones are rejected unread."""
MOST_CAPTION_BYTES = MOST_CAPTIONS * CAPTION_BYTES + 4
"""Bytes that are read of a caption file."""


class FilePair(NamedTuple):
    """A picture and its caption files, before they are read."""

    picture: str
    caption: str
    """Name of the .txt; "" if there is none."""
    note: str
    """Name of the .json; "" if there is none."""


def folder_rows(files: Files, walked: list[Folder]) -> Iterator[FilePair | Unusable]:
    """Pictures with their caption files, in name order; every file is in a pair or a reject.

    NAME.png|jpg|jpeg|webp has its captions in NAME.txt, one per line, or as the `caption` of
    NAME.json; extensions may be upper case.
    """
    for folder, folders, names in walked:
        if isinstance(folder, Unusable):
            yield folder
            continue
        above = f"{folder}/" if folder else ""
        for name in folders:
            if files.is_link(above + name):
                yield unusable(files.where(above + name), "is a symbolic link; copy the files")
        notes: dict[str, dict[str, str]] = defaultdict(dict)
        pictures = {_stem(name) for name in names if is_picture(name)}
        for name in names:
            if (extension := extension_of(name)) in (CAPTION, NOTE):
                notes[_stem(name)].setdefault(extension, name)
        for name in names:
            beside = notes[_stem(name)]
            if extension_of(name) in EXTENSIONS:
                texts = (above + beside[e] if e in beside else "" for e in (CAPTION, NOTE))
                yield _row(files, FilePair(above + name, *texts))
            elif _stem(name) not in pictures or name not in beside.values():
                yield _other(files, above + name)


def loose_rows(files: Files, walked: list[Folder]) -> Iterator[Unusable]:
    """Rejects for the files among tars that are not tars; only pictures count as unusable."""
    for folder, _, names in walked:
        if isinstance(folder, Unusable):
            yield folder
            continue
        for name in names:
            path = f"{folder}/{name}" if folder else name
            where = files.where(path)
            if is_picture(name):
                yield unusable(where, "is among tars; pack it from a folder of its own")
            elif is_tar(name):
                if not files.is_file(path):
                    yield unusable(where, "is not a plain file", "archive")
            else:
                kind, reason = why_not_read(name)
                yield unusable(where, reason if kind != IGNORED else "is not a tar", kind)


def file_pair(files: Files, row: FilePair | Unusable, archive: str = "") -> Pair | Unusable:
    """Read a picture and its captions; its key begins with `archive`, if that is given."""
    if isinstance(row, Unusable):
        return row
    where = files.where(row.picture)
    try:
        caption = captions_of(_start(files, row.caption), _start(files, row.note))
        if caption is None:
            text = f"{_stem(PurePosixPath(row.picture).name)}.{CAPTION}"
            return unusable(where, f"has no caption; write it to {text} beside it", "caption")
        picture = files.read(row.picture, MOST_BYTES + 1)
    except OSError as error:
        return unusable(where, f"or its caption cannot be read: {error.strerror}")
    if len(picture) > MOST_BYTES:
        return unusable(where, f"is larger than the limit of {MOST_BYTES} bytes")
    path = PurePosixPath(row.picture)
    name = f"{archive}/{path.with_suffix('')}" if archive else path.with_suffix("").as_posix()
    return make_pair(key_of(name), picture, path.suffix, caption, where)


def _row(files: Files, row: FilePair) -> FilePair | Unusable:
    """The row, or why it is refused unread."""
    where = files.where(row.picture)
    if any(files.is_link(name) for name in row if name):
        return unusable(where, "or its caption is a symbolic link; copy the file itself")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return unusable(where, "has a name that is not UTF-8; rename it")
    if not files.is_file(row.picture):
        return unusable(where, "is not a plain file")
    return row


def _other(files: Files, name: str) -> Unusable:
    """The reject of a file that belongs to no pair."""
    where = files.where(name)
    if files.is_link(name):
        return unusable(where, "is neither a picture nor a .txt caption")
    if extension_of(name) == CAPTION:
        return unusable(where, "is a caption without a picture", IGNORED)
    kind, reason = why_not_read(PurePosixPath(name).name)
    return unusable(where, reason, kind)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _start(files: Files, name: str) -> bytes | None:
    return files.read(name, MOST_CAPTION_BYTES) if name and files.is_file(name) else None
