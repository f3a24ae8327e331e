"""The files of a source: those of a local folder, or the objects of a store.

Both are listed and read alike, so that a source ends in the same pairs and rejects wherever it is.
Names are relative to the source's folder, with forward slashes.
"""

import io
import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from core.errors import AbsentError
from core.storage.entry import Entry
from core.storage.ranged_file import RangedFile
from core.storage.store import Store
from data_pipeline.sources.names import IS_METADATA, is_metadata
from data_pipeline.sources.pair import METADATA, Unusable, unusable

_BUFFER = 2**16

Folder = tuple[str | Unusable, list[str], list[str]]
"""(name, folders in it, files in it), as of os.walk; or a reject and two empty lists."""


class Select(Protocol):
    """Which names of a folder belong to a source."""

    def selects(self, name: str) -> bool:
        """True if a file belongs to it."""

    def enters(self, folder: str) -> bool:
        """True if files below a folder may belong to it."""


class Everything:
    """All files of a folder."""

    def selects(self, name: str) -> bool:
        return True

    def enters(self, folder: str) -> bool:
        return True


class Files(Protocol):
    """A folder of files."""

    url: str

    def where(self, name: str) -> str:
        """A file's place, for messages."""

    def walk(self, select: Select) -> Iterator[Folder]:
        """Folders in name order, without metadata of file systems, each of which is a reject."""

    def rows(self, select: Select) -> list[Entry]:
        """Sizes and tags of all files."""

    def read(self, name: str, most: int) -> bytes:
        """The first bytes of a file. Raises: OSError."""

    def open(self, name: str) -> IO[bytes]:
        """A seekable file. Raises: OSError."""

    def place(self, name: str) -> str:
        """A file's absolute path or URL."""

    def entry(self, name: str) -> Entry | None:
        """Size and tag of a file; None if it is gone."""

    def is_link(self, name: str) -> bool:
        """True for a symbolic link."""

    def is_file(self, name: str) -> bool:
        """True for a plain file, or a link to one."""


class LocalFiles:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, root.as_posix()

    def where(self, name: str) -> str:
        return (self.root / name).as_posix()

    def walk(self, select: Select) -> Iterator[Folder]:
        failed: list[OSError] = []
        for path, folders, names in os.walk(self.root, onerror=failed.append):
            folder = "" if path == str(self.root) else Path(path).relative_to(self.root).as_posix()
            yield from _without_metadata(self, folder, folders, names, select)
            while failed:
                yield _unreadable(failed.pop())
        for error in failed:
            yield _unreadable(error)

    def rows(self, select: Select) -> list[Entry]:
        rows = []
        for path, folders, names in os.walk(self.root):
            folder = Path(path).relative_to(self.root)
            folders[:] = [n for n in folders if select.enters((folder / n).as_posix())]
            for name in ((folder / name).as_posix() for name in names):
                if select.selects(name):
                    rows.append(entry_of(self.root / name, name))
        return sorted(rows)

    def read(self, name: str, most: int) -> bytes:
        with open(self.root / name, "rb") as file:
            return file.read(most)

    def open(self, name: str) -> IO[bytes]:
        return open(self.root / name, "rb")

    def place(self, name: str) -> str:
        return (self.root / name).absolute().as_posix()

    def entry(self, name: str) -> Entry | None:
        path = self.root / name
        return entry_of(path, name) if path.is_file() else None

    def is_link(self, name: str) -> bool:
        return (self.root / name).is_symlink()

    def is_file(self, name: str) -> bool:
        return (self.root / name).is_file()


class StoredFiles:
    """A prefix of a store; objects are plain files."""

    def __init__(self, store: Store) -> None:
        self.store, self.url = store, store.url
        self._listed: list[Entry] | None = None

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def walk(self, select: Select) -> Iterator[Folder]:
        names = []
        for row in self.rows(select):
            if "" in row.name.split("/"):
                yield unusable(self.where(row.name), "has an empty part in its name"), [], []
            else:
                names.append(row.name)
        yield from self._walk("", names, select)

    def _walk(self, folder: str, names: list[str], select: Select) -> Iterator[Folder]:
        """Walk one folder; `names` are those of all objects below it, sorted."""
        start = len(folder) + 1 if folder else 0
        files = [name[start:] for name in names if "/" not in name[start:]]
        below = dict.fromkeys(n[start:].partition("/")[0] for n in names if "/" in n[start:])
        folders = list(below)
        yield from _without_metadata(self, folder, folders, files, select)
        for each in folders:
            inside = f"{folder}/{each}" if folder else each
            first = bisect_left(names, f"{inside}/")
            last = bisect_left(names, f"{inside}0")  # the character after a slash
            yield from self._walk(inside, names[first:last], select)

    def rows(self, select: Select) -> list[Entry]:
        if self._listed is None:
            self._listed = self.store.entries()
        return [row for row in self._listed if select.selects(row.name)]

    def read(self, name: str, most: int) -> bytes:
        try:
            return self.store.get(name, 0, most)
        except AbsentError as error:
            raise FileNotFoundError(2, "there is no such object") from error

    def open(self, name: str) -> IO[bytes]:
        entry = self.entry(name)
        if entry is None:
            raise FileNotFoundError(2, "there is no such object")
        return io.BufferedReader(RangedFile(self.store, name, entry.size), _BUFFER)

    def place(self, name: str) -> str:
        return self.where(name)

    def entry(self, name: str) -> Entry | None:
        try:
            size, tag = self.store.head(name)
        except AbsentError:
            return None
        return Entry(name, size, tag)

    def is_link(self, name: str) -> bool:
        return False

    def is_file(self, name: str) -> bool:
        return True


def entry_of(path: Path, name: str) -> Entry:
    """Size and time of a local file; of a link to nothing, its own."""
    try:
        stat = path.stat()
    except OSError:
        stat = path.lstat()
    return Entry(name, stat.st_size, str(stat.st_mtime_ns))


def _without_metadata(
    files: Files, folder: str, folders: list[str], names: list[str], select: Select
) -> Iterator[Folder]:
    """One folder of a walk: sorted, and metadata taken out as rejects."""
    above = f"{folder}/" if folder else ""
    for entries in (folders, names):
        chosen = select.enters if entries is folders else select.selects
        entries[:] = sorted(name for name in entries if chosen(above + name))
        for name in entries:
            if is_metadata(PurePosixPath(name)):
                yield unusable(files.where(above + name), IS_METADATA, METADATA), [], []
        entries[:] = [name for name in entries if not is_metadata(PurePosixPath(name))]
    yield folder, folders, names


def _unreadable(error: OSError) -> Folder:
    return unusable(str(error.filename), f"cannot be read: {error.strerror}"), [], []
