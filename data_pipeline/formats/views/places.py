"""Where the shards of a data set are stored: beside its manifest, or at a place of their own.

A set in place, or a view of another set, names the path or URL of each of its tars. A tar that has
changed since is found by its size and ETag before its first block is read, and by the checksum of
each block. In a folder only the size is compared.
"""

import posixpath
import threading
from pathlib import Path

from core.config import S3
from core.errors import AbsentError, CorruptError
from core.storage.store import FolderStore, Store, open_store
from data_pipeline.formats.manifest import Shard

CHANGED = "restore it, or pack the archives again into an empty place"


class Places:
    """Finds the store and the name of each shard of a split; opens each folder or bucket once."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._opened: dict[str, Store] = {}
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def of(self, shard: Shard) -> tuple[Store, str]:
        """The store of a shard, and its name there."""
        if not shard.place:
            return self._store, self._prefix + shard.name
        root, name = _parts(shard.place)
        with self._lock:
            if root not in self._opened:
                self._opened[root] = open_store(root)
            return self._opened[root], name

    def check(self, shard: Shard) -> None:
        """Compare a shard at another place with its entry, once.

        Raises: CorruptError, naming both, if it is another object.
        """
        if not shard.place or shard.place in self._checked:
            return
        store, name = self.of(shard)
        try:
            size, etag = store.head(name)
        except AbsentError as error:
            raise CorruptError(
                f"{shard.place}, a tar of this data set, is gone ({error}); {CHANGED}"
            ) from error
        expected = shard.etag if etag else ""
        if (size, etag if expected else "") != (shard.bytes, expected):
            raise CorruptError(
                f"{shard.place} has changed since it was packed: it has {size} bytes"
                f"{f' and the ETag {etag}' if expected else ''}, the manifest says {shard.bytes}"
                f"{f' and {expected}' if expected else ''}; {CHANGED}"
            )
        self._checked.add(shard.place)


def place_of(store: Store, prefix: str, shard: Shard) -> str:
    """The path or URL of a shard."""
    if shard.place:
        return shard.place
    root = store.root.absolute().as_posix() if isinstance(store, FolderStore) else store.url
    return f"{root}/{prefix}{shard.name}"


def _parts(place: str) -> tuple[str, str]:
    """(what to open, name in it): the bucket, or the folder."""
    if place.startswith(S3):
        bucket, _, name = place.removeprefix(S3).partition("/")
        return S3 + bucket, name
    path = Path(place)
    return path.parent.as_posix(), posixpath.basename(path.as_posix())
