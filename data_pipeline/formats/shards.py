"""Tar shards, written by the webdataset library, and the manifests of data sets."""

import io
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray

from core.errors import InputError
from core.files.atomic import sha256
from core.storage.store import Store
from data_pipeline.formats.index import (
    BlockIndex,
    Ranges,
    dump_index,
    dump_shard_index,
    first_double,
    index_of,
    read_shard_index,
)
from data_pipeline.formats.manifest import INDEX, Manifest, Shard, write_manifest

webdataset.utils.enforce_security = True

_READERS = 16


@dataclass(frozen=True, kw_only=True)
class Member:
    """The offsets of a file in a tar."""

    name: str
    header: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """Offset of the next member's header."""
        return self.start + -(-self.length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def build_tar(samples: list[dict[str, Any]]) -> bytes:
    """Write samples ({"__key__": ..., extension: bytes}) as a tar; equal samples, equal bytes."""
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, encoder=False, mtime=0, user="tapir", group="tapir")
    for sample in samples:
        writer.write(sample)
    writer.close()
    return buffer.getvalue()


def list_members(tar: bytes) -> list[Member]:
    """List the files of a tar, or of a part of one that is cut between members."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        return [
            Member(
                name=member.name,
                header=member.offset,
                start=member.offset_data,
                length=member.size,
            )
            for member in archive
        ]


def describe(
    store: Store, prefix: str, name: str, tar: bytes, ranges: Ranges, ids: NDArray[np.uint64]
) -> Shard:
    """Write the index of a stored shard, and return its manifest entry."""
    index = dump_shard_index(index_of(tar, ranges), ids)
    shard = Shard(
        name=name,
        samples=len(ids),
        blocks=len(ranges),
        bytes=len(tar),
        sha256=sha256(tar),
        etag=store.etag(prefix + name),
        index_sha256=sha256(index),
    )
    store.put(prefix + shard.index_name, index)
    return shard


def put_manifest(
    store: Store,
    prefix: str,
    kind: str,
    shards: Sequence[Shard],
    facts: dict[str, Any],
    rejects: dict[str, int],
    variants: int = 1,
    numerics: Sequence[dict[str, Any]] = (),
) -> Manifest:
    """Concatenate the shards' indexes and write the manifest, as the last files of a data set.

    Raises: InputError if an id occurs twice; CorruptError for a damaged index.
    """
    with ThreadPoolExecutor(_READERS, "index") as pool:
        indexes = list(pool.map(lambda shard: read_shard_index(store, prefix, shard), shards))
    once = len(shards) // variants
    double = first_double([arrays.pop("ids") for arrays in indexes][:once])
    if double >= 0:
        raise InputError(
            f"{store.url}/{prefix} holds two pairs of the id {double}; give every pair its own key"
        )
    index = dump_index(
        [
            BlockIndex(**{name: rows for name, rows in arrays.items() if name != "places"})
            for arrays in indexes
        ]
    )
    store.put(prefix + INDEX, index)
    manifest = Manifest(
        format=kind,
        shards=list(shards),
        samples=sum(shard.samples for shard in shards[:once]),
        facts=facts,
        rejects=rejects,
        index_sha256=sha256(index),
        variants=variants,
        numerics=list(numerics),
    )
    write_manifest(store, prefix, manifest)
    return manifest
