"""Tar shards: written by the webdataset library, with a byte-offset index beside each."""

import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

import webdataset

from core.errors import CorruptError
from core.files import sha256
from core.store import Store
from data_pipeline.manifest import Shard

webdataset.utils.enforce_security = True


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where a file lies inside of a tar."""

    name: str
    start: int
    length: int


def build_tar(samples: list[dict[str, Any]]) -> bytes:
    """Write samples ({"__key__": ..., extension: bytes}) as one tar, byte for byte repeatable."""
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, encoder=False, mtime=0, user="tapir", group="tapir")
    for sample in samples:
        writer.write(sample)
    writer.close()
    return buffer.getvalue()


def list_members(tar: bytes) -> list[Member]:
    """List the files of a tar with their offsets."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return [
            Member(name=member.name, start=member.offset_data, length=member.size)
            for member in archive
        ]


def put_shard(store: Store, prefix: str, name: str, tar: bytes, index: dict[str, Any]) -> Shard:
    """Store a tar and its index, and describe them."""
    data = json.dumps(index, separators=(",", ":")).encode()
    shard = Shard(
        name=name,
        samples=index["samples"],
        bytes=len(tar),
        sha256=sha256(tar),
        etag="",
        index_sha256=sha256(data),
    )
    store.put(prefix + shard.index_name, data)
    store.put(prefix + name, tar)
    return Shard(**{**vars(shard), "etag": store.etag(prefix + name)})


def read_index(store: Store, prefix: str, shard: Shard) -> Any:
    """Read a shard's index and check its digest.

    Raises: CorruptError, naming the shard.
    """
    data = store.get(prefix + shard.index_name)
    if sha256(data) != shard.index_sha256:
        raise CorruptError(
            f"{store.url}/{prefix}{shard.index_name} differs from its manifest: expected sha256 "
            f"{shard.index_sha256}, got {sha256(data)}; mend it by the command that made it, with "
            "--again"
        )
    return json.loads(data)
