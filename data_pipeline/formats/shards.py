"""Tar shards, written by the webdataset library, and the manifests of data sets."""

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray

from core.errors import CorruptError
from core.files.atomic import sha256
from core.storage.store import Store
from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.ids import IdSorter
from data_pipeline.formats.index import (
    Ranges,
    dump_shard_index,
    empty_index,
    fill,
    index_of,
    index_parts,
    read_shard_index,
)
from data_pipeline.formats.manifest import EARLIER, INDEX, Manifest, Shard, write_manifest

webdataset.utils.enforce_security = True


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
    figures: Mapping[str, float] | None = None,
    parent: Manifest | None = None,
) -> Manifest:
    """Write index.safetensors, ids.bin and the manifest, as the last files of a data set.

    `parent`: the version before of a growing data set, which begins with the same shards.
    Each shard's index is read once, and its ids are dropped when they are in a temporary file.
    Raises: InputError if an id occurs twice; CorruptError for a damaged index.
    """
    if parent is not None:
        facts = {**facts, EARLIER: [*parent.earlier, parent.fingerprint]}
    manifest = Manifest(
        format=kind,
        shards=list(shards),
        samples=sum(shard.samples for shard in shards[: len(shards) // variants]),
        facts=facts,
        rejects=rejects,
        index_sha256="",
        variants=variants,
        numerics=list(numerics),
        figures=dict(figures or {}),
    )
    with IdSorter(manifest.samples, f"{store.url}/{prefix}".rstrip("/")) as ids:
        index_sha256 = _write_index(store, prefix, manifest, ids)
        lookup = {"sha256": ids.write(store, prefix + manifest.file(IDS)), "bits": ids.bits}
    manifest = replace(manifest, index_sha256=index_sha256, lookup=lookup)
    write_manifest(store, prefix, manifest)
    return manifest


def _write_index(store: Store, prefix: str, manifest: Manifest, ids: IdSorter) -> str:
    """Concatenate the shards' indexes, and collect the first variant's ids; returns the sha256."""
    shards = manifest.shards
    index = empty_index(sum(shard.blocks for shard in shards))
    once, blocks, records = len(shards) // manifest.variants, 0, 0
    read = fetched(lambda shard: read_shard_index(store, prefix, shard), shards)
    for number, (shard, arrays) in enumerate(zip(shards, read, strict=True)):
        if len(arrays["start"]) != shard.blocks or len(arrays["ids"]) != shard.samples:
            raise CorruptError(
                f"{store.url}/{prefix}{shard.index_name} has other counts than its shard; mend it "
                "by the command that made it, with --again"
            )
        blocks += fill(index, blocks, arrays)
        if number < once:
            ids.add(records, arrays["ids"], arrays["places"])
            records += shard.samples
    digest = hashlib.sha256()
    for part in index_parts(index):
        digest.update(part)
    store.put_parts(prefix + manifest.file(INDEX), index_parts(index))
    return digest.hexdigest()
