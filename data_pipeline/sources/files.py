"""Pairs that a user already has: a folder of images with .txt captions, or WebDataset tars."""

import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_pipeline.captions import MOST_BYTES as CAPTION_BYTES
from data_pipeline.images import EXTENSIONS
from data_pipeline.sources.pair import EXTENSIONS_OF_NOTES, IGNORED, Pair, Unusable

_ENDED_BY = "ended_by"
MOST_BYTES = 64 * 2**20
"""A larger picture, or member of an archive, is refused before it is read."""


def folder_pairs(root: Path) -> Iterator[Pair | Unusable]:
    """Yield NAME.png|jpg|jpeg|webp with NAME.txt, by name; every file is in a pair or a reject."""
    for folder, folders, names in walk(root):
        if isinstance(folder, Unusable):
            yield folder
            continue
        folders.sort()
        for name in sorted(folders):
            if Path(folder, name).is_symlink():
                yield _unusable(Path(folder, name).as_posix(), "is a symbolic link; copy the files")
        pictures = {Path(name).stem for name in names if _is_picture(name)}
        for name in sorted(names):
            path = Path(folder, name)
            suffix = path.suffix.lower()[1:]
            if suffix in EXTENSIONS:
                yield _file(root, path)
            elif suffix != "txt":
                kind = IGNORED if not path.is_symlink() else "file"
                yield _unusable(path.as_posix(), "is no picture and no .txt caption", kind)
            elif path.stem not in pictures:
                yield _unusable(path.as_posix(), "is a caption without a picture", IGNORED)


def walk(root: Path) -> Iterator[tuple[Path | Unusable, list[str], list[str]]]:
    """`os.walk` without links; a folder that cannot be read comes as a reject."""
    failed: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=failed.append, followlinks=False):
        yield Path(folder), folders, names
        while failed:
            error = failed.pop()
            yield _unusable(str(error.filename), f"cannot be read: {error.strerror}"), [], []
    for error in failed:
        yield _unusable(str(error.filename), f"cannot be read: {error.strerror}"), [], []


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


def _file(root: Path, path: Path) -> Pair | Unusable:
    where, text = path.as_posix(), path.with_suffix(".txt")
    if path.is_symlink() or text.is_symlink():
        return _unusable(where, "or its caption is a symbolic link; copy the file itself")
    try:
        where.encode()
    except UnicodeEncodeError:
        return _unusable(where, "has a name that is not UTF-8; rename it")
    if not path.is_file():
        return _unusable(where, "is no plain file")
    if not text.is_file():
        return _unusable(where, f"has no caption; write it to {text.name} beside it", "caption")
    if path.stat().st_size > MOST_BYTES:
        return _unusable(where, f"has {path.stat().st_size} bytes; the limit is {MOST_BYTES}")
    with open(text, "rb") as file:
        caption = file.read(CAPTION_BYTES + 4)
    key = _key(path.relative_to(root).with_suffix("").as_posix())
    return make_pair(key, path.read_bytes(), path.suffix, caption, where)


def tar_pairs(paths: list[Path], root: Path) -> Iterator[Pair | Unusable]:
    """Yield the pairs of WebDataset tars: neighbours KEY.jpg|png|webp and KEY.txt.

    A .json with a `caption`, as some downloaders write it, does instead of the .txt. Links, paths
    that leave the archive, members over the limit and broken archives come as rejects. A key
    begins with the archive's path below `root`.
    """
    for path in paths:
        name = path.relative_to(root).with_suffix("").as_posix()
        try:
            with tarfile.open(path, "r|*", tarinfo=_Header) as tar:
                yield from _members(tar, path, name)
                ended_by = getattr(tar, _ENDED_BY, None)
                if not isinstance(ended_by, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                    raise tarfile.ReadError(f"no end mark, or a damaged member at {tar.offset}")
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            reason = f"{path} is no whole tar archive: {error}; what comes behind is lost"
            yield Unusable(key=path.as_posix(), kind="archive", reason=reason)


class _Header(tarfile.TarInfo):
    """Tells the archive why the last header was none: tarfile takes a damaged one for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            setattr(archive, _ENDED_BY, error)
            raise


def loose_files(root: Path) -> Iterator[Unusable]:
    """What lies among tars: pictures are rejects, other files are counted."""
    for folder, _, names in walk(root):
        if isinstance(folder, Unusable):
            yield folder
            continue
        for name in sorted(names):
            where = (folder / name).as_posix()
            if _is_picture(name):
                yield _unusable(where, "lies among tars; pack it from a folder of its own")
            elif not is_tar(name) and name.rpartition(".")[2].lower() not in EXTENSIONS_OF_NOTES:
                yield _unusable(where, "is no tar", IGNORED)


def is_tar(name: str) -> bool:
    """Say whether a file is named like an archive of pairs."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def _members(tar: tarfile.TarFile, path: Path, archive: str) -> Iterator[Pair | Unusable]:
    key, parts = "", {}
    for member in tar:
        name = PurePosixPath(member.name)
        where = f"{path}:{member.name}"
        if name.is_absolute() or ".." in name.parts or member.issym() or member.islnk():
            yield _unusable(where, "is a link or leaves the archive; such members are refused")
            continue
        if member.isdir():
            continue
        if not member.isfile():
            yield _unusable(where, "is no plain file")
            continue
        stem, _, extension = name.name.partition(".")
        stem, extension = (name.parent / stem).as_posix(), extension.lower()
        if stem != key:
            yield from _complete(f"{path}:{key}", f"{archive}__{key}", parts)
            key, parts = stem, {}
        if member.size > MOST_BYTES:
            yield _unusable(where, f"has {member.size} bytes; the limit is {MOST_BYTES}")
        elif extension in (*EXTENSIONS, "txt", "json"):
            parts[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
        elif extension not in EXTENSIONS_OF_NOTES:
            yield _unusable(where, "is no picture and no .txt caption", IGNORED)
    yield from _complete(f"{path}:{key}", f"{archive}__{key}", parts)


def _complete(where: str, key: str, parts: dict[str, bytes]) -> Iterator[Pair | Unusable]:
    found = [extension for extension in parts if extension in EXTENSIONS]
    caption = parts.get("txt", _caption_of(parts.get("json", b"")))
    if found and caption is not None:
        yield make_pair(_key(key), parts[found[0]], "." + found[0], caption, where)
        for extension in found[1:]:
            yield _unusable(f"{where}.{extension}", "is a second picture of one caption", "image")
    elif found:
        yield _unusable(where, "has no caption; a pair is a picture and a .txt", "caption")
    elif "txt" in parts:
        yield _unusable(where, "has a caption and no picture", "image")


def _key(name: str) -> str:
    """A pair's key from its path: no folders, no further extension, nothing unprintable."""
    plain = "".join(c if c.isprintable() else "_" for c in name)
    return plain.replace("/", "__").replace(".", "_")


def _caption_of(note: bytes) -> bytes | None:
    try:
        text = json.loads(note).get("caption")
    except (ValueError, AttributeError, RecursionError):
        return None
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else None


def make_pair(key: str, image: bytes, suffix: str, caption: bytes, where: str) -> Pair:
    """A pair that decides its split by its own key."""
    extension = suffix.lower()[1:].replace("jpeg", "jpg")
    return Pair(
        key=key, image=image, extension=extension, caption=caption, split_key=key, where=where
    )


def _unusable(where: str, reason: str, kind: str = "file") -> Unusable:
    text = where.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return Unusable(key=text, kind=kind, reason=f"{text} {reason}")
