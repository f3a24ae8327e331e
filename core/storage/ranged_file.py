"""A stored object as a seekable file that is read in parts, so that memory is bounded.

An interrupted request continues at its offset (Store.get). While parts are read in order, the next
one is fetched ahead by a thread.
"""

import io
import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from core.errors import StoreError
from core.storage.store import Store

PART = 8 * 2**20
"""Bytes of a request."""
_KEPT = 3
"""Parts in memory: two columns of a table, and the one that is fetched ahead."""


class RangedFile(io.RawIOBase):
    """An object of a known size."""

    def __init__(self, store: Store, name: str, size: int, part: int = PART) -> None:
        self._store, self._name, self._size, self._part = store, name, size, part
        self._at = 0
        self._last = -1
        self._kept: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "ranges")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of a part.

        Raises: StoreError if the object has become shorter.
        """
        number, offset = divmod(self._at, self._part)
        if self._at >= self._size or not len(buffer):
            return 0
        data = memoryview(self._fetched(number))[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(cancel_futures=True)
            self._kept.clear()
        super().close()

    def _fetched(self, number: int) -> bytes:
        """A part; asks for the next one if the last two were neighbours."""
        future = self._asked(number)
        if number == self._last + 1 and (number + 1) * self._part < self._size:
            self._asked(number + 1)
        self._last = number
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        data = future.result()
        if len(data) != min(self._part, self._size - number * self._part):
            raise StoreError(
                f"{self._store.url}/{self._name} has become shorter than its {self._size} bytes "
                "while it was read; pack again when nothing writes to it"
            )
        return data

    def _asked(self, number: int) -> "Future[bytes]":
        if number not in self._kept:
            start = number * self._part
            length = min(self._part, self._size - start)
            self._kept[number] = self._pool.submit(self._store.get, self._name, start, length)
        self._kept.move_to_end(number)
        return self._kept[number]
