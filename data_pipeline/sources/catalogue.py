"""Opens the SRC of `tapir pack SRC DEST` as a stream of pairs."""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from core.errors import InputError
from core.files.atomic import sha256
from data_pipeline.config import SHAPES_COUNT, PackConfig
from data_pipeline.images.crops import encode_png
from data_pipeline.sources.emoji import emoji_pairs
from data_pipeline.sources.files import folder_pairs, loose_files
from data_pipeline.sources.names import is_metadata, is_tar
from data_pipeline.sources.pair import Pair, Unusable
from data_pipeline.sources.shapes import draw_scene, render
from data_pipeline.sources.table import table_pairs
from data_pipeline.sources.tars import tar_pairs


def open_source(source: str, config: PackConfig) -> Iterator[Pair | Unusable]:
    """Open `shapes`, `emoji`, a folder of images and captions, tars or tables.

    Raises: InputError if there is no such source.
    """
    path = Path(source)
    if source == "shapes":
        return shapes_pairs(config.count or SHAPES_COUNT, config.pixels, config.seed)
    pairs: Iterator[Pair | Unusable]
    if source == "emoji":
        pairs = emoji_pairs(config.cache)
    elif path.is_file() and is_tar(path.name):
        pairs = tar_pairs([path], path.parent)
    elif path.is_file() and path.suffix == ".parquet":
        pairs = table_pairs([path])
    elif path.is_dir():
        pairs = _folder(path)
    elif path.exists():
        raise InputError(
            f"{source!r} is not a source; give a folder, a tar (plain, gzip, bzip2 or xz) or a "
            ".parquet table, and unpack other archives"
        )
    else:
        raise InputError(
            f"there is no source {source!r}; give shapes, emoji, a folder of images with .txt "
            "captions, a tar, a .parquet table, or a folder of tars or tables"
        )
    return pairs


def _folder(path: Path) -> Iterator[Pair | Unusable]:
    """Tars if there are any (img2dataset writes a table beside each), else captions or tables."""
    tars = sorted(p for p in path.rglob("*") if is_tar(p.name) and _is_content(p, path))
    if tars:
        return chain(tar_pairs(tars, path), loose_files(path))
    tables = sorted(p for p in path.glob("*.parquet") if _is_content(p, path))
    return (
        table_pairs(tables)
        if tables and not next(path.rglob("*.txt"), None)
        else folder_pairs(path)
    )


def _is_content(path: Path, root: Path) -> bool:
    return path.is_file() and not is_metadata(path.relative_to(root))


def source_content(source: str) -> str:
    """Digest of a path's file names, sizes and times, to detect a changed source."""
    path = Path(source)
    if source in ("shapes", "emoji") or not path.exists():
        return ""
    walked = os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]
    files = sorted(os.path.join(folder, name) for folder, _, names in walked for name in names)
    stats = [(file, os.lstat(file)) for file in files]
    rows = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return sha256("\n".join(rows).encode("utf-8", "surrogateescape"))


def shapes_pairs(count: int, pixels: int, seed: int) -> Iterator[Pair]:
    """Yield the first `count` pictures of the shapes generator; equal captions share a split."""
    for index in range(count):
        scene = draw_scene(seed, index)
        yield Pair(
            key=f"shapes-{index:09d}",
            image=encode_png(render(scene, pixels, seed, index)),
            extension="png",
            caption=scene.caption.encode(),
            split_key=scene.caption,
            where=f"shapes #{index}",
        )
