"""A store that counts the requests which S3 would get for the same calls."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator

from core.storage.entry import Entry
from core.storage.s3 import _PART as PART
from core.storage.store import Store

PAGE = 1000
"""Names of one answer to a listing of an S3 store."""


class CountedStore:
    """Counts the requests that an S3 store would get."""

    def __init__(self, store: Store, names: bool = True) -> None:
        """`names`: count the reads of each object, too."""
        self.store, self.url, self._names = store, store.url, names
        self.requests: Counter[str] = Counter()
        self.bytes_read = 0
        self.names_read: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _count(self, kind: str, times: int = 1) -> None:
        with self._lock:
            self.requests[kind] += times

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self._count("GET")
        if self._names:
            with self._lock:
                self.names_read[name] += 1
        data = self.store.get(name, start, length)
        with self._lock:
            self.bytes_read += len(data)
        return data

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        self._count("PUT")
        return self.store.put(name, data, if_absent)

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        size = 0

        def counted() -> Iterator[bytes | memoryview]:
            nonlocal size
            for part in parts:
                size += len(part)
                yield part

        self.store.put_parts(name, counted())
        self._count("PUT", 1 if size < PART else 2 + -(-size // PART))

    def names(self, prefix: str = "") -> list[str]:
        names = self.store.names(prefix)
        self._count("LIST", max(1, -(-len(names) // PAGE)))
        return names

    def entries(self, prefix: str = "") -> list[Entry]:
        entries = self.store.entries(prefix)
        self._count("LIST", max(1, -(-len(entries) // PAGE)))
        return entries

    def exists(self, name: str) -> bool:
        self._count("HEAD")
        return self.store.exists(name)

    def delete(self, name: str) -> None:
        self._count("DELETE")
        self.store.delete(name)

    def head(self, name: str) -> tuple[int, str]:
        self._count("HEAD")
        return self.store.head(name)
