"""From the SRC of `tapir pack SRC ... DEST` to the units of the job, by one listing of each."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Literal

from core.config import S3, check, place_problems
from core.errors import InputError
from core.files.atomic import sha256
from core.storage.entry import Entry
from core.storage.store import open_store
from data_pipeline.config import DRAWN, DRAWN_COUNT, PackConfig
from data_pipeline.sources.drawn.panels import CELLS
from data_pipeline.sources.files import FilePair, folder_rows, loose_rows
from data_pipeline.sources.listed import NOTHING, Listed, Packed
from data_pipeline.sources.names import CAPTION, extension_of, is_picture, is_tar
from data_pipeline.sources.pair import IGNORED, METADATA, Unusable, printable
from data_pipeline.sources.patterns import Pattern, is_pattern
from data_pipeline.sources.places import (
    Everything,
    Files,
    Folder,
    LocalFiles,
    Select,
    StoredFiles,
    entry_of,
)
from data_pipeline.sources.table import row_groups
from data_pipeline.sources.units import FileRow, Unit

GENERATED = (*DRAWN, "emoji")
_TABLE = ".parquet"
TABLE_BYTES = 2**30
"""A larger table is cut into units of about this size, at its row groups."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One SRC."""

    text: str
    content: str
    """Digest of its names, sizes and times or ETags, to detect a changed source."""
    files: Files | None = None
    """None for what is generated."""
    select: Select = field(default_factory=Everything)
    single: Entry | None = None
    """The one archive or table that the source is."""


@dataclass(kw_only=True)
class Plan:
    """The units of all sources, in order."""

    units: list[Unit] = field(default_factory=list)
    listings: dict[str, list[FileRow]] = field(default_factory=dict)
    """Name -> the slice of a listing that a unit reads."""


def open_sources(texts: Sequence[str]) -> list[Source]:
    """Open `shapes`, `panels`, `emoji`, folders, tars, tables and patterns, here or in a store.

    Raises: InputError if there is no such source.
    """
    return [_open(text) for text in texts]


def plan_units(
    sources: Sequence[Source],
    config: PackConfig,
    earlier: Packed = NOTHING,
) -> Plan:
    """List the sources and cut what `earlier` does not have into units.

    Raises: InputError if a source is nothing that can be packed, or a file is in two of them.
    """
    plan, names = Plan(), _Names()
    for name in earlier.names:
        names.add(name)
    several = len(sources) + earlier.sources > 1
    listed = Listed(earlier, several)
    for number, source in enumerate(sources):
        if source.files is None:
            plan.units += _generated(source.text, number, config)
            continue
        in_source = _units(source, number, source.files)
        _refuse_empty(source.text, *in_source)
        units, rows = listed.new(printable(source.text), source.files, *in_source)
        stems = [stem for row in rows if (stem := stem_of(row))] if several else []
        prefix = names.prefix(earlier.sources + number, [*(unit.archive for unit in units), *stems])
        for (_, archive), parts in groupby(units, lambda unit: (unit.name, unit.archive)):
            own = names.own(prefix + archive)
            plan.units += [replace(unit, archive=own) for unit in parts]
        for stem in dict.fromkeys(stems):
            names.add(prefix + stem)
        for part in _slices(rows, config.shard_pairs):
            name = f"units/files-{len(plan.listings):06d}.json"
            plan.listings[name] = part
            archive = prefix.rstrip("/")
            unit = Unit(kind="files", source=number, name=name, archive=archive, size=len(part))
            plan.units.append(unit)
    return plan


def _open(text: str) -> Source:
    if text in GENERATED:
        return Source(text=text, content="")
    path, stored = Path(text), text.startswith(S3)
    if not stored and path.is_dir():
        return Source(text=text, files=LocalFiles(path), content=_content(path))
    if not stored and path.is_file():
        return _single(text, LocalFiles(path.parent), entry_of(path, path.name), _content(path))
    if is_pattern(text):
        return _matched(text)
    check(place_problems(text))
    if not stored:
        raise _no_source(text)
    return _stored(text)


def _single(text: str, files: Files, entry: Entry, content: str) -> Source:
    if not is_tar(entry.name) and PurePosixPath(entry.name).suffix != _TABLE:
        raise InputError(
            f"{text!r} is not a source; give a folder, a tar (plain, gzip, bzip2 or xz) or a "
            ".parquet table, and unpack other archives"
        )
    return Source(text=text, files=files, single=entry, content=content)


def _matched(text: str) -> Source:
    pattern = Pattern(text)
    stored = text.startswith(S3)
    files: Files = (
        StoredFiles(open_store(pattern.root)) if stored else LocalFiles(Path(pattern.root))
    )
    rows = files.rows(pattern)
    missing = pattern.missing([row.name for row in rows])
    if missing or not rows:
        raise InputError(
            f"no file matches {files.where(missing) if missing else text!r}; every name of a brace "
            "must exist, and a * stays within a folder"
        )
    return Source(text=text, files=files, select=pattern, content=_digest(rows))


def _stored(text: str) -> Source:
    """An object, or the objects below a prefix."""
    above, _, name = text.rstrip("/").rpartition("/")
    if above.startswith(S3):  # else the text is a bucket
        parent = StoredFiles(open_store(above))
        if entry := parent.entry(name):
            return _single(text, parent, entry, _digest([entry]))
    files = StoredFiles(open_store(text))
    rows = files.rows(Everything())
    if not rows:
        raise _no_source(text)
    return Source(text=text, files=files, content=_digest(rows))


def _no_source(text: str) -> InputError:
    return InputError(
        f"there is no source {text!r}; give shapes, panels, emoji, a folder of images with .txt "
        "captions, a tar, a .parquet table, a folder of tars or tables, a pattern of them, or "
        "s3://bucket/prefix"
    )


def _digest(rows: Sequence[Entry]) -> str:
    text = "\n".join(f"{row.name} {row.size} {row.tag}" for row in rows)
    return sha256(text.encode("utf-8", "surrogateescape"))


def _content(path: Path) -> str:
    """Digest of a local path's file names, sizes and times."""
    walked = os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]
    files = sorted(os.path.join(folder, name) for folder, _, names in walked for name in names)
    stats = [(file, os.lstat(file)) for file in files]
    rows = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return sha256("\n".join(rows).encode("utf-8", "surrogateescape"))


def _generated(text: str, number: int, config: PackConfig) -> list[Unit]:
    if text == "emoji":
        return [Unit(kind="emoji", source=number)]
    if text == "panels" and config.pixels % CELLS:
        near = max(2, round(config.pixels / CELLS)) * CELLS
        raise InputError(
            f"pixels={config.pixels}: a panel is {CELLS} cells high, so give --pixels a multiple "
            f"of {CELLS}; try {near}"
        )
    kind: Literal["shapes", "panels"] = "panels" if text == "panels" else "shapes"
    count, size = config.count or DRAWN_COUNT, config.shard_pairs
    return [
        Unit(kind=kind, source=number, first=i, count=min(size, count - i), size=size)
        for i in range(0, count, size)
    ]


def _units(source: Source, number: int, files: Files) -> tuple[list[Unit], list[FileRow]]:
    """The archives or tables of a source, and the rows of its other files.

    Tars if there are any (img2dataset writes a table beside each), else tables or pictures.
    """
    if source.single is not None:
        walked: list[Folder] = [("", [], [source.single.name])]
        sizes = {source.single.name: source.single}
    else:
        walked = list(files.walk(source.select))
        sizes = {row.name: row for row in files.rows(source.select)}
    paths = [f"{folder}/{n}" if folder else n for folder, _, names in walked for n in names]
    tars = [path for path in paths if is_tar(path) and files.is_file(path)]
    if tars:
        units = [_unit("tar", number, sizes[path]) for path in sorted(tars, key=_parts)]
        return units, list(loose_rows(files, walked))
    if tables := _tables(paths):
        return [unit for path in tables for unit in _table(files, number, sizes[path])], []
    return [], list(folder_rows(files, walked))


def _refuse_empty(text: str, units: list[Unit], rows: list[FileRow]) -> None:
    """Refuse a source of which nothing would be packed or be a reject that counts."""
    rejects = [row for row in rows if isinstance(row, Unusable)]
    if units or any(row.kind not in (IGNORED, METADATA) for row in rejects):
        return
    if len(rejects) == len(rows):
        first = f"; its files are passed over: {rejects[0].reason}" if rejects else ""
        raise InputError(
            f"the source {text!r} holds no pairs: no tars, tables or images with captions{first}"
        )


def _unit(kind: Literal["tar", "table"], number: int, row: Entry) -> Unit:
    archive = PurePosixPath(row.name).with_suffix("").as_posix()
    return Unit(
        kind=kind, source=number, name=row.name, archive=archive, size=row.size, tag=row.tag
    )


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path).parts


def _tables(paths: list[str]) -> list[str]:
    """The tables at the top of a source without captions, or all of one without pictures."""
    tables = sorted((p for p in paths if PurePosixPath(p).suffix == _TABLE), key=_parts)
    top = [path for path in tables if "/" not in path]
    if any(extension_of(path) == CAPTION for path in paths):
        return []
    return top or ([] if any(map(is_picture, paths)) else tables)


def _table(files: Files, number: int, row: Entry) -> list[Unit]:
    """A table, or runs of its row groups of about TABLE_BYTES each."""
    whole = _unit("table", number, row)
    if row.size <= TABLE_BYTES:
        return [whole]
    units, first, at, size = list[Unit](), 0, 0, 0
    groups = row_groups(files, row.name)
    for i, (_, held) in enumerate(groups):
        size += held
        if size >= TABLE_BYTES or i + 1 == len(groups):
            units.append(replace(whole, first=first, count=i + 1 - first, row=at, size=size))
            at += sum(rows for rows, _ in groups[first : i + 1])
            first, size = i + 1, 0
    return units or [whole]


def _slices(rows: list[FileRow], most: int) -> Iterator[list[FileRow]]:
    """Cut rows into slices of about `most`; pictures of one stem stay together."""
    stems = [stem_of(row) for row in rows]
    last = {stem: i for i, stem in enumerate(stems)}
    first, open_until = 0, -1
    for i, stem in enumerate(stems):
        open_until = max(open_until, last[stem] if stem else -1)
        if i + 1 == len(rows) or (i + 1 - first >= most and open_until <= i):
            yield rows[first : i + 1]
            first = i + 1


def stem_of(row: FileRow) -> str:
    """A pair's name, of which its key is made; "" of a reject."""
    if not isinstance(row, FilePair):
        return ""
    return PurePosixPath(row.picture).with_suffix("").as_posix()


class _Names:
    """Makes the names with which keys begin unique: none equals or is a folder of another."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._folders: set[str] = set()

    def prefix(self, number: int, names: Sequence[str]) -> str:
        """What a source's names get in front: nothing if no source before it has one of them."""
        prefix = ""
        while any(self._is_taken(prefix + name) for name in names):
            prefix = f"~{prefix}" if prefix else f"{number}/"
        return prefix

    def own(self, name: str) -> str:
        """The name, or ~2/NAME if it is taken."""
        choice, number = name, 1
        while self._is_taken(choice):
            number += 1
            choice = f"~{number}/{name}"
        self.add(choice)
        return choice

    def add(self, name: str) -> None:
        self._names.add(name)
        self._folders.update(path.as_posix() for path in PurePosixPath(name).parents)

    def _is_taken(self, name: str) -> bool:
        above = (path.as_posix() for path in PurePosixPath(name).parents)
        return name in self._names or name in self._folders or not self._names.isdisjoint(above)
