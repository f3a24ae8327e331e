"""`tapir verify` of data sets: every byte, or a keyed sample of the blocks, in threads."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from core.errors import CorruptError
from core.keys import key_fraction
from core.storage.store import Store
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.ids import row_type
from data_pipeline.formats.index import BlockReader, read_index, read_shard_index
from data_pipeline.formats.manifest import Manifest, Shard, kind_of, read_manifest

_THREADS = 16
_PART = 8 * 2**20


def verify_split(store: Store, split: str, sample: float = 1.0, seed: int = 0) -> int:
    """Check a split's manifest, its indexes, and its shards or a fraction `sample` of their blocks.

    Of shards at another place, all blocks are checked: the rest of such a tar is not read. Earlier
    versions list some of the same shards; their other files are checked too.
    Returns the number of shards, or of sampled blocks, that were read.
    Raises: CorruptError naming the first damaged file.
    """
    prefix = f"{split}/"
    kind = kind_of(store, prefix)
    manifest = read_manifest(store, prefix, kind)
    blocks = BlockReader(store, prefix, manifest)
    indexed = [shard for shard in manifest.shards if shard.index_sha256]
    _all(lambda shard: read_shard_index(store, prefix, shard), indexed)
    check_lookup(store, prefix, manifest)
    for version in range(1, manifest.version):
        earlier = read_manifest(store, prefix, kind, version)
        read_index(store, prefix, earlier)
        check_lookup(store, prefix, earlier)
    if sample >= 1.0:
        own = [shard for shard in manifest.shards if not shard.place]
        _all(lambda shard: _check_shard(store, prefix, shard), own)
        elsewhere = [i for i, shard in enumerate(manifest.shards) if shard.place]
        _all(blocks.read, (block for i in elsewhere for block in range(*blocks.blocks_of(i))))
        return len(manifest.shards)
    chosen = [
        (block, variant)
        for variant in range(manifest.variants)
        for block in range(len(blocks.records))
        if key_fraction(seed, block, variant, "verify") < sample
    ]
    chosen = chosen or [(0, 0)]
    _all(lambda place: blocks.read(*place), chosen)
    return len(chosen)


def _all(check: Callable[[Any], object], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_THREADS, "verify") as pool:
        try:
            for _ in pool.map(check, items):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def check_lookup(store: Store, prefix: str, manifest: Manifest) -> None:
    """Check ids.bin, if the data set has one.

    Raises: CorruptError, naming the file.
    """
    if manifest.lookup:
        row = row_type(manifest.samples).itemsize
        size = manifest.samples * row + 8 * (2 ** manifest.lookup["bits"] + 1)
        _check_digest(store, prefix + manifest.file(IDS), size, manifest.lookup["sha256"])


def _check_shard(store: Store, prefix: str, shard: Shard) -> None:
    _check_digest(store, prefix + shard.name, shard.bytes, shard.sha256)


def _check_digest(store: Store, name: str, size: int, expected: str) -> None:
    digest = hashlib.sha256()
    for start in range(0, size + 1, _PART):  # the last part reaches beyond the end
        digest.update(store.get(name, start, _PART))
    if digest.hexdigest() != expected:
        raise CorruptError(
            f"{store.url}/{name} has sha256 {digest.hexdigest()}, its manifest says "
            f"{expected}; mend it by the command that made it, with --again"
        )
