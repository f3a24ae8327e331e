"""Pairs that a user already has: a folder of images with .txt captions, or WebDataset tars."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from core.errors import InputError
from data_pipeline.images import EXTENSIONS
from data_pipeline.sources.pair import Pair

MOST_BYTES = 64 * 2**20
"""A larger member of an archive is refused before it is read."""


def folder_pairs(root: Path) -> Iterator[Pair]:
    """Yield NAME.png|jpg|jpeg|webp with NAME.txt, by name.

    Raises: InputError if the folder holds no image, or an image has no caption.
    """
    images = [p for p in sorted(root.rglob("*")) if p.suffix.lower()[1:] in EXTENSIONS]
    if not images:
        raise InputError(
            f"{root} holds no images; put NAME.png (or .jpg, .webp) and NAME.txt there"
        )
    for path in images:
        text = path.with_suffix(".txt")
        if not text.exists():
            raise InputError(f"{path} has no caption; write it to {text.name} beside it")
        if path.is_symlink() or text.is_symlink():
            raise InputError(f"{path} or its caption is a symbolic link; copy the file itself")
        key = path.relative_to(root).with_suffix("").as_posix().replace("/", "__").replace(".", "_")
        yield _pair(key, path.read_bytes(), path.suffix, text.read_bytes(), str(path))


def tar_pairs(paths: list[Path]) -> Iterator[Pair]:
    """Yield the pairs of WebDataset tars: neighbours KEY.jpg|png|webp and KEY.txt.

    Raises: InputError for links, paths that escape, members over the limit and broken archives.
    """
    for path in paths:
        try:
            with tarfile.open(path, "r|*") as tar:
                yield from _members(tar, path)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise InputError(f"{path} is no whole tar archive: {error}") from error


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[Pair]:
    key, parts = "", {}
    for member in tar:
        name = PurePosixPath(member.name)
        where = f"{path}:{member.name}"
        if name.is_absolute() or ".." in name.parts or member.issym() or member.islnk():
            raise InputError(f"{where} is a link or leaves the archive; such archives are refused")
        if not member.isfile():
            continue
        if member.size > MOST_BYTES:
            raise InputError(f"{where} has {member.size} bytes; the limit is {MOST_BYTES}")
        stem, _, extension = name.name.partition(".")
        stem = (name.parent / stem).as_posix()
        if stem != key:
            yield from _complete(path, key, parts)
            key, parts = stem, {}
        if extension.lower() in (*EXTENSIONS, "txt"):
            parts[extension.lower()] = tar.extractfile(member).read()  # type: ignore[union-attr]
    yield from _complete(path, key, parts)


def _complete(path: Path, key: str, parts: dict[str, bytes]) -> Iterator[Pair]:
    found = [extension for extension in parts if extension != "txt"]
    if found and "txt" in parts:
        name = f"{path.stem}__{key}".replace("/", "__").replace(".", "_")
        yield _pair(name, parts[found[0]], "." + found[0], parts["txt"], f"{path}:{key}")
    elif parts:
        raise InputError(f"{path}:{key} has {', '.join(parts)} only; a pair is an image and a .txt")


def _pair(key: str, image: bytes, suffix: str, caption: bytes, where: str) -> Pair:
    extension = suffix.lower()[1:].replace("jpeg", "jpg")
    return Pair(
        key=key, image=image, extension=extension, caption=caption, split_key=key, where=where
    )
