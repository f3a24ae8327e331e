"""Stores of data: a folder, or a bucket of any S3-compatible object store.

`open_store("s3://bucket/prefix")` reads AWS_ENDPOINT_URL and the credentials from the
environment, as boto3 does; credentials are never written to a file.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from core.config import S3, place_problems
from core.errors import AbsentError, ConfigError, StoreError, StoreInputError, if_full
from core.files.atomic import TEMPORARY, write_atomic, write_parts
from core.files.file_systems import LOCK, rename_if_absent
from core.storage.entry import Entry
from core.storage.s3 import S3Store

_WRONG_FOLDER = (
    PermissionError,
    FileExistsError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
)


T = TypeVar("T")
_AGAIN = 20


class Store(Protocol):
    """A flat name space of immutable byte strings; names use forward slashes."""

    url: str

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read an object or a range of it; AbsentError if there is none."""

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        """Write an object atomically; with if_absent, returns False if it exists."""

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write an object that comes in parts; it appears whole or not at all."""

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with the prefix, sorted."""

    def entries(self, prefix: str = "") -> list[Entry]:
        """All objects whose names begin with the prefix, in the order of their names."""

    def exists(self, name: str) -> bool:
        """True if the object exists."""

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""

    def head(self, name: str) -> tuple[int, str]:
        """(size, ETag) of an object in one request, without reading it; a folder has no ETags."""


class FolderStore:
    """A folder of the file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with open(self._path(name), "rb") as file:
                file.seek(start)
                return file.read() if length is None else file.read(length)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise AbsentError(f"there is no {name} in {self.root}") from error
        except OSError as error:
            raise StoreError(f"cannot read {self._path(name)}: {error}") from error

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        path = self._path(name)
        try:
            if not if_absent:
                _patiently(lambda: write_atomic(path, data))
                return True
            staged = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}")
            return _patiently(lambda: _link(self.root, staged, path, data))
        except _WRONG_FOLDER as error:
            raise StoreInputError(f"{self.root} cannot be written to: {error.strerror}") from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise StoreInputError(f"{self.root} is read-only; give another place") from error
            raise StoreError(f"cannot write {path}: {error}{if_full(error)}") from error

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        path = self._path(name)
        try:
            write_parts(path, parts)
        except _WRONG_FOLDER as error:
            raise StoreInputError(f"{self.root} cannot be written to: {error.strerror}") from error
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}{if_full(error)}") from error

    def names(self, prefix: str = "") -> list[str]:
        start = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        walked = os.walk(start, onerror=_raise_unless_gone)
        files = (
            path for at, _, here in walked for name in here if (path := Path(at, name)).is_file()
        )
        names = (
            path.relative_to(self.root).as_posix()
            for path in files
            if not path.name.startswith((TEMPORARY, LOCK))
        )
        return sorted(name for name in names if name.startswith(prefix))

    def entries(self, prefix: str = "") -> list[Entry]:
        stats = ((name, self._path(name).stat()) for name in self.names(prefix))
        return [Entry(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats]

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
        except _WRONG_FOLDER as error:
            raise StoreInputError(f"{self.root} cannot be written to: {error.strerror}") from error
        except OSError as error:
            raise StoreError(f"cannot delete {path}: {error}") from error
        if path.parent != self.root:
            with suppress(OSError):  # not empty, or already gone
                path.parent.rmdir()

    def head(self, name: str) -> tuple[int, str]:
        try:
            return self._path(name).stat().st_size, ""
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AbsentError(f"there is no {name} in {self.root}") from error
        except OSError as error:
            raise StoreError(f"cannot read {self._path(name)}: {error}") from error

    def _path(self, name: str) -> Path:
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(os.path.normpath(self.root)):
            raise StoreInputError(f"{name!r} points outside of {self.root}")
        return path


def free_space(store: Store) -> int | None:
    """Free bytes on a folder's disk; None for an object store."""
    if not isinstance(store, FolderStore):
        return None
    place = store.root.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _raise_unless_gone(error: OSError) -> None:
    """Ignore folders that vanish during the listing or are not readable: they are not ours."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        raise StoreError(f"cannot list {error.filename}: {error}") from error


def _link(root: Path, staged: Path, path: Path, data: bytes) -> bool:
    """Write a temporary file and rename it, unless the name exists."""
    write_atomic(staged, data)
    try:
        return rename_if_absent(staged, path, root)
    finally:
        staged.unlink(missing_ok=True)


def _patiently(write: Callable[[], T]) -> T:
    """Retry a write whose folder was deleted meanwhile: `delete` removes empty ones."""
    for _ in range(_AGAIN):
        with suppress(FileNotFoundError):
            return write()
    return write()


def open_store(url: str) -> Store:
    """Open `s3://bucket/prefix` or a folder (which need not exist yet).

    Raises: ConfigError for anything else.
    """
    if problems := place_problems(url):
        raise ConfigError(problems[0])
    if url.startswith(S3):
        bucket, _, prefix = url.removeprefix(S3).partition("/")
        return S3Store(bucket, prefix)
    return FolderStore(Path(url))
