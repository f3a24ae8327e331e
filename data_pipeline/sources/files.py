"""Pairs from a folder of pictures with .txt or .json captions."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.images.crops import EXTENSIONS
from data_pipeline.sources.names import (
    CAPTION,
    IS_METADATA,
    NOTE,
    extension_of,
    is_metadata,
    is_picture,
    is_tar,
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
from data_pipeline.text.captions import MOST_BYTES as CAPTION_BYTES
from data_pipeline.text.captions import MOST_CAPTIONS

MOST_BYTES = 64 * 2**20
"""Maximum size of a picture or archive member; larger ones are rejected unread."""
MOST_CAPTION_BYTES = MOST_CAPTIONS * CAPTION_BYTES + 4
"""Bytes that are read of a caption file."""


def folder_pairs(root: Path) -> Iterator[Pair | Unusable]:
    """Yield pictures with their captions, in name order; every file yields a pair or a reject.

    NAME.png|jpg|jpeg|webp has its captions in NAME.txt, one per line, or as the `caption` of
    NAME.json; extensions may be upper case.
    """
    for folder, folders, names in walk(root):
        if isinstance(folder, Unusable):
            yield folder
            continue
        for name in sorted(folders):
            if Path(folder, name).is_symlink():
                yield unusable(Path(folder, name).as_posix(), "is a symbolic link; copy the files")
        notes: dict[str, dict[str, str]] = defaultdict(dict)
        pictures = {Path(name).stem for name in names if is_picture(name)}
        for name in sorted(names):
            if (extension := extension_of(name)) in (CAPTION, NOTE):
                notes[Path(name).stem].setdefault(extension, name)
        for name in sorted(names):
            if extension_of(name) in EXTENSIONS:
                yield _file(root, folder / name, notes[Path(name).stem])
            elif Path(name).stem not in pictures or name not in notes[Path(name).stem].values():
                yield _other(folder / name)


def walk(root: Path) -> Iterator[tuple[Path | Unusable, list[str], list[str]]]:
    """`os.walk` in name order, without links and metadata; unreadable folders yield a reject."""
    failed: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=failed.append, followlinks=False):
        for entries in (folders, names):
            for name in sorted(entries):
                if is_metadata(Path(name)):
                    entries.remove(name)
                    yield unusable(Path(folder, name).as_posix(), IS_METADATA, METADATA), [], []
        folders.sort()
        yield Path(folder), folders, names
        while failed:
            error = failed.pop()
            yield unusable(str(error.filename), f"cannot be read: {error.strerror}"), [], []
    for error in failed:
        yield unusable(str(error.filename), f"cannot be read: {error.strerror}"), [], []


def loose_files(root: Path) -> Iterator[Unusable]:
    """Rejects for the files among tars that are not tars; only pictures count as unusable."""
    for folder, _, names in walk(root):
        if isinstance(folder, Unusable):
            yield folder
            continue
        for name in sorted(names):
            where = (folder / name).as_posix()
            if is_picture(name):
                yield unusable(where, "is among tars; pack it from a folder of its own")
            elif not is_tar(name):
                kind, reason = why_not_read(name)
                yield unusable(where, reason if kind != IGNORED else "is not a tar", kind)


def _other(path: Path) -> Unusable:
    """The reject of a file that belongs to no pair."""
    if path.is_symlink():
        return unusable(path.as_posix(), "is neither a picture nor a .txt caption")
    if extension_of(path.name) == CAPTION:
        return unusable(path.as_posix(), "is a caption without a picture", IGNORED)
    kind, reason = why_not_read(path.name)
    return unusable(path.as_posix(), reason, kind)


def _file(root: Path, path: Path, notes: dict[str, str]) -> Pair | Unusable:
    where, text = path.as_posix(), f"{path.stem}.{CAPTION}"
    name = path.relative_to(root).with_suffix("").as_posix()
    beside = {extension: path.parent / name for extension, name in notes.items()}
    if path.is_symlink() or any(note.is_symlink() for note in beside.values()):
        return unusable(where, "or its caption is a symbolic link; copy the file itself")
    try:
        name.encode()
    except UnicodeEncodeError:
        return unusable(where, "has a name that is not UTF-8; rename it")
    if not path.is_file():
        return unusable(where, "is not a plain file")
    try:
        contents = {extension: _start(note) for extension, note in beside.items() if note.is_file()}
        caption = captions_of(contents.get(CAPTION), contents.get(NOTE))
        if caption is None:
            return unusable(where, f"has no caption; write it to {text} beside it", "caption")
        if path.stat().st_size > MOST_BYTES:
            return unusable(where, f"has {path.stat().st_size} bytes; the limit is {MOST_BYTES}")
        return make_pair(key_of(name), path.read_bytes(), path.suffix, caption, where)
    except OSError as error:
        return unusable(where, f"or its caption cannot be read: {error.strerror}")


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MOST_CAPTION_BYTES)
