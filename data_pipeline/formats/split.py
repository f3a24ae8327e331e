"""A split's manifest and index, read by one rank and handed on to the others as bytes.

Checking the manifest of 125,000 shards takes 3 s of a core, and every rank starts at the same time.
Ranks that read no records get the manifest without its shards.
"""

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as tensors

from core.config import to_json
from core.storage.store import Store
from data_pipeline.formats.index import BlockIndex, BlockReader, read_index
from data_pipeline.formats.manifest import (
    NEWEST,
    Manifest,
    Shard,
    newest_manifests,
    read_manifest,
    version_of,
)
from data_pipeline.streaming.cache import BlockCache

_HEAD = 8
"""Bytes of the header's length."""
_SHARD = tuple(field.name for field in fields(Shard))


@dataclass(frozen=True, kw_only=True)
class OpenSplit:
    """A checked manifest and its index."""

    manifest: Manifest
    """On ranks that read no records it has no shards."""
    fingerprint: str
    """That of the whole manifest."""
    sizes: NDArray[np.int64]
    """Number of records of each block."""
    index: tuple[BlockIndex, ...] = ()
    """Block arrays of each variant; empty on ranks that read no records."""

    def without_index(self) -> "OpenSplit":
        """What a rank needs to follow the order of the records without reading them."""
        return replace(self, manifest=replace(self.manifest, shards=[]), index=())


def open_split(store: Store, split: str, kind: str, version: int = NEWEST) -> OpenSplit:
    """Read a split's manifest and index: three requests, and a further one of an older version.

    Raises: InputError if there is none or it is of another kind; CorruptError if it is damaged.
    """
    return _open(store, split, read_manifest(store, f"{split}/", kind, version))


def newest_splits(store: Store, kind: str) -> dict[str, OpenSplit]:
    """The splits of the newest version that both have.

    Raises: as `open_split`.
    """
    manifests = newest_manifests(store, kind)
    return {split: _open(store, split, manifest) for split, manifest in manifests.items()}


def splits_at(store: Store, kind: str, train: str, held_out: str = "") -> dict[str, OpenSplit]:
    """The train split of one fingerprint, and the validation split of the version of another.

    Both are fingerprints of train splits.
    Raises: InputError if the data set has no such version; as `open_split`.
    """
    newest = read_manifest(store, "train/", kind)
    version = version_of(store, newest, train)
    if version != newest.version:
        splits = {"train": open_split(store, "train", kind, version)}
    else:
        splits = {"train": _open(store, "train", newest)}
    if held_out:
        version = version_of(store, newest, held_out)
        splits["validation"] = open_split(store, "validation", kind, version)
    return splits


def newer_split(store: Store, kind: str, fingerprint: str) -> dict[str, OpenSplit]:
    """The train split of the newest version that both have; empty if it has this fingerprint.

    Raises: InputError if it is not a later version of that one; as `open_split`.
    """
    newest = newest_manifests(store, kind)["train"]
    if newest.version == version_of(store, newest, fingerprint):
        return {}
    return {"train": _open(store, "train", newest)}


def _open(store: Store, split: str, manifest: Manifest) -> OpenSplit:
    index = read_index(store, f"{split}/", manifest)
    return OpenSplit(
        manifest=manifest,
        fingerprint=manifest.fingerprint,
        sizes=index[0].records.astype(np.int64),
        index=tuple(index),
    )


def dump_split(split: OpenSplit) -> bytes:
    """Serialise a split: the header's length, a JSON header, and the arrays as safetensors."""
    body = to_json(replace(split.manifest, shards=[]))
    body["shards"] = list(map(attrgetter(*_SHARD), split.manifest.shards))
    header = json.dumps({"manifest": body, "fingerprint": split.fingerprint}).encode()
    arrays = {"sizes": split.sizes}
    for i, index in enumerate(split.index):
        arrays |= {f"{i}.{name}": array for name, array in index.arrays.items()}
    return len(header).to_bytes(_HEAD, "little") + header + bytes(tensors.save(arrays))


def load_split(data: bytes) -> OpenSplit:
    """Parse the output of `dump_split`; nothing is checked again."""
    end = _HEAD + int.from_bytes(data[:_HEAD], "little")
    header, arrays = json.loads(data[_HEAD:end]), dict(tensors.load(data[end:]))
    body, sizes = header["manifest"], arrays.pop("sizes")
    rows = body.pop("shards")
    shards = [Shard(**dict(zip(_SHARD, row, strict=True))) for row in rows]
    variants: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in arrays.items():
        number, _, name = key.partition(".")
        variants.setdefault(number, {})[name] = array
    index = tuple(BlockIndex(**variants[str(i)]) for i in range(len(variants)))
    manifest = Manifest(shards=shards, **body)
    return OpenSplit(manifest=manifest, fingerprint=header["fingerprint"], sizes=sizes, index=index)


class SplitSource:
    """The records of a split; what reads them is opened at once on ranks that have the index."""

    kind = ""
    """Format of the manifest: RAW or TOKENS."""

    def __init__(
        self,
        store: Store,
        split: str,
        cache: BlockCache | None = None,
        opened: OpenSplit | None = None,
    ) -> None:
        """`opened`: the split as another rank has read it; else it is read here."""
        self._store, self._split, self._cache = store, split, cache
        self._opened = opened or open_split(store, split, self.kind)
        self.manifest, self.fingerprint = self._opened.manifest, self._opened.fingerprint
        self.sizes, self.variants = self._opened.sizes, self.manifest.variants
        if self.has_index:
            _ = self.blocks

    def at(self, opened: OpenSplit) -> Self:
        """The same split in another version of the data set."""
        return type(self)(self._store, self._split, self._cache, opened)

    @property
    def has_index(self) -> bool:
        """False on ranks that read no records."""
        return bool(self._opened.index)

    @cached_property
    def blocks(self) -> BlockReader:
        """Reads blocks; a rank without the index reads it when it is first asked for a block."""
        opened = self._opened
        if not self.has_index:
            opened = open_split(self._store, self._split, self.kind, self.manifest.version)
        prefix = f"{self._split}/"
        return BlockReader(self._store, prefix, opened.manifest, self._cache, opened.index)
