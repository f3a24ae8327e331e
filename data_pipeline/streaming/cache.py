"""A local cache of fetched blocks: a folder that several ranks of a machine may share."""

import threading
import time
from contextlib import suppress
from pathlib import Path

from core.errors import InputError
from core.files.atomic import TEMPORARY, sha256
from core.log import LOG
from data_pipeline.config import LoaderConfig

_SUFFIX = ".block"
_KEPT = 0.9
"""Fraction of the size limit that remains after an eviction."""
_STALE_SECONDS = 3600.0


class BlockCache:
    """Stores blocks by a key that contains their checksum; the reader verifies it."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most = folder, most_bytes
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"loader.cache={folder} cannot be made: {error.strerror}") from error
        for left in folder.glob(f"{TEMPORARY}*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    left.unlink()
        self._bytes = sum(size for _, _, size in self._files())

    def get(self, key: str) -> bytes | None:
        """The block of a key, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            path.touch()
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Store a block, without fsync: a lost block is fetched again."""
        path = self._path(key)
        temporary = path.with_name(f"{TEMPORARY}{threading.get_native_id()}-{path.name}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            LOG.warning("the block cache %s cannot be written: %s", self._folder, error)
            temporary.unlink(missing_ok=True)
            return
        with self._lock:
            self._bytes += len(data)
            if self._bytes > self._most:
                self._evict()

    def _path(self, key: str) -> Path:
        return self._folder / (sha256(key.encode())[:32] + _SUFFIX)

    def _evict(self) -> None:
        files = sorted(self._files())
        self._bytes = sum(size for _, _, size in files)
        for _, path, size in files:
            if self._bytes <= _KEPT * self._most:
                break
            path.unlink(missing_ok=True)
            self._bytes -= size

    def _files(self) -> list[tuple[float, Path, int]]:
        files = []
        for path in self._folder.glob(f"[!.]*{_SUFFIX}"):
            with suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime, path, stat.st_size))
        return files


def open_cache(loader: LoaderConfig) -> BlockCache | None:
    """The loader's cache, or None if it is not configured."""
    if loader.cache is None:
        return None
    return BlockCache(loader.cache, int(loader.cache_gigabytes * 1e9))
