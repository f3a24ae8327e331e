"""Tar shards of the webdataset library, and token manifests."""

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
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


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    info.uname = info.gname = "tapir"
    return info


_HEADER = _info("", 0).tobuf(tarfile.USTAR_FORMAT)
_OWNER, _TIME, _REST = _HEADER[100:124], _HEADER[136:148], _HEADER[156:]
"""A header but for its name, size and checksum."""
_TOTAL = sum(_OWNER) + sum(_TIME) + 8 * ord(" ") + sum(_REST)
"""Its checksum without name and size."""


class TarBuffer:
    """A tar in memory, member by member; equal members, equal bytes.

    Writes what the webdataset library would, for `tapir pack`: the library imports torch,
    and takes a tenth of a millisecond a pair.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # a BytesIO copies what it holds each time it grows
        self.size = 0
        """Offset of the next member's header."""

    def add(self, name: str, data: bytes) -> None:
        """Append a member."""
        header = _header(name, len(data))
        padding = -len(data) % tarfile.BLOCKSIZE
        self._parts += (header, data, bytes(padding))
        self.size += len(header) + len(data) + padding

    def finish(self) -> bytes:
        """The whole tar, with its end mark."""
        end = self.size + 2 * tarfile.BLOCKSIZE
        self._parts.append(bytes(end - self.size + -end % tarfile.RECORDSIZE))
        return b"".join(self._parts)


def _header(name: str, size: int) -> bytes:
    """TarInfo.tobuf for short names without its tenth of a millisecond."""
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        return _info(name, size).tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    title, length = name.encode(), b"%011o\0" % size
    total = _TOTAL + sum(title) + sum(length)
    return b"".join(
        (title, bytes(100 - len(title)), _OWNER, length, _TIME, b"%06o\0 " % total, _REST)
    )


def build_tar(samples: list[dict[str, Any]]) -> bytes:
    """Write samples ({"__key__": ..., extension: bytes}) as a tar; equal samples, equal bytes."""
    import webdataset  # noqa: PLC0415 - imports torch, which `tapir pack` does without

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
        etag=store.head(prefix + name)[1],
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
