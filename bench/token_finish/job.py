"""A token job in which every shard is done, without the work: indexes, markers and ledgers.

Only as many tars are written as the manifest's figures read. Ids, counts and sizes are those of a
real job: 2,000 records a shard in blocks of 125, 1,024 image tokens.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.support.sizes import sized
from bench.support.synthetic import VOCABULARY
from core.config import to_json
from core.files.atomic import canonical_json, seal, sha256
from core.keys import keyed_rng
from core.storage.store import FolderStore, Store
from data_pipeline.formats.index import BlockIndex, dump_shard_index, index_of
from data_pipeline.formats.manifest import INDEX, NAME, RAW, Manifest, Shard, write_manifest
from data_pipeline.formats.shards import build_tar, list_members
from data_pipeline.formats.tokens import TokenRecords, encode_block
from data_pipeline.jobs.ledger import DONE, LEDGER, ROWS
from data_pipeline.tokenize.figures import FIRST_BLOCKS

RECORDS, BLOCK, GRID, TEXT = sized(2000, 40), sized(125, 20), sized(32, 4), 16
PREFIX = "train/"
UNLISTED = 128
"""Shards without a line in a ledger, as of killed workers."""
NUMERICS = {"device": "cpu", "matmul": "highest", "conv": "highest", "software": "synthetic"}
_WHOLE = "whole.json"


def facts(raw: Manifest) -> dict[str, Any]:
    """The facts of the token manifest."""
    vocabulary = {"image_vocabulary": VOCABULARY, "text_vocabulary": VOCABULARY}
    made = {"dvae": "none", "tokenizer": "none", "grid": GRID, **vocabulary}
    return {**made, "raw": raw.fingerprint, "split": "train"}


def task_of(shard: int) -> str:
    """The task of a raw shard."""
    return sha256(f"task {shard}".encode())


def write_job(raw: Store, tokens: Store, shards: int) -> None:
    """Write the job, or take back the end of an earlier one of the same size."""
    kept = canonical_json({"shards": shards, "records": RECORDS, "block": BLOCK})
    write = _writer(tokens)
    if not tokens.exists(_WHOLE) or tokens.get(_WHOLE) != kept:
        write_manifest(raw, PREFIX, _raw_manifest(shards))
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda shard: _write_shard(write, shard), range(shards)):
                pass
        tokens.put(_WHOLE, kept)
    for name in [PREFIX + NAME, PREFIX + INDEX, *tokens.names(f"{PREFIX}_leases/")]:
        tokens.delete(name)
    _write_ledgers(tokens, write, shards)


def _writer(store: Store) -> Callable[[str, bytes], Any]:
    """Put an object; in a folder without a sync of each file."""
    if not isinstance(store, FolderStore):
        return store.put
    root = store.root
    for folder in (DONE, LEDGER):
        (root / PREFIX / folder).mkdir(parents=True, exist_ok=True)
    return lambda name, data: Path(root, name).write_bytes(data)


def _raw_manifest(shards: int) -> Manifest:
    rows = [
        Shard(
            name=f"shard-{i:06d}.tar",
            samples=RECORDS,
            blocks=-(-RECORDS // 64),
            bytes=40_000 * RECORDS,
            sha256=sha256(f"raw {i}".encode()),
            etag=sha256(f"etag {i}".encode())[:32],
            index_sha256=sha256(f"raw index {i}".encode()),
        )
        for i in range(shards)
    ]
    samples = shards * RECORDS
    return Manifest(
        format=RAW, shards=rows, samples=samples, facts={}, rejects={}, index_sha256=sha256(b"")
    )


def _ids(shard: int) -> NDArray[np.uint64]:
    """Ids like hashes: splitmix64 of the record's number, cut to 63 bits."""
    x = np.arange(shard * RECORDS + 1, (shard + 1) * RECORDS + 1, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ids: NDArray[np.uint64] = (x ^ (x >> np.uint64(31))) >> np.uint64(1)
    return ids


def _write_shard(write: Callable[[str, bytes], Any], shard: int) -> None:
    task, ids = task_of(shard), _ids(shard)
    name = f"{task}-0.tar"
    counts = [min(BLOCK, RECORDS - at) for at in range(0, RECORDS, BLOCK)]
    if shard * len(counts) < FIRST_BLOCKS:
        tar, index = _tar(shard, ids)
        write(PREFIX + name, tar)
    else:
        sizes = np.asarray(counts, np.uint32)
        bytes_ = sizes * np.uint32(2 * (GRID**2 + TEXT) + 12) + np.uint32(20)
        start = np.cumsum([512, *(bytes_[:-1] + np.uint32(1024))]).astype(np.uint64)
        crcs = keyed_rng(shard, "crc").integers(0, 2**32, len(counts), np.uint32)
        index = BlockIndex(start=start, bytes=bytes_, records=sizes, crc32=crcs)
        tar = f"no tar {shard}".encode()
    stored = dump_shard_index(index, ids)
    described = Shard(
        name=name,
        samples=RECORDS,
        blocks=len(counts),
        bytes=len(tar),
        sha256=sha256(tar),
        etag=sha256(tar)[:32],
        index_sha256=sha256(stored),
    )
    write(PREFIX + described.index_name, stored)
    record = {"shards": [to_json(described)], "rejects": {}, "rejects_sha256": sha256(b"")}
    record |= {"first_reject": "", "numerics": NUMERICS}
    write(f"{PREFIX}{DONE}{task}.json", canonical_json(record))


def _tar(shard: int, ids: NDArray[np.uint64]) -> tuple[bytes, BlockIndex]:
    rng = keyed_rng(shard, "codes")
    codes = rng.integers(0, VOCABULARY, (RECORDS, GRID**2), np.uint16)
    text = rng.integers(0, VOCABULARY, RECORDS * TEXT, np.uint16)
    records = TokenRecords(ids, codes, text, np.arange(RECORDS + 1) * TEXT)
    tar = build_tar(
        [
            {"__key__": f"block-{i:06d}", "bin": encode_block(records[i : i + BLOCK])}
            for i in range(0, RECORDS, BLOCK)
        ]
    )
    members = list_members(tar)
    sizes = [min(BLOCK, RECORDS - at) for at in range(0, RECORDS, BLOCK)]
    ranges = [(m.start, m.length, n) for m, n in zip(members, sizes, strict=True)]
    return tar, index_of(tar, ranges)


def _write_ledgers(tokens: Store, write: Callable[[str, bytes], Any], shards: int) -> None:
    """The ledgers of workers that made ROWS shards each, as they stood before the end."""
    listed = max(0, shards - UNLISTED)
    firsts: Iterable[int] = range(0, listed, ROWS)

    def part(first: int) -> None:
        tasks = [task_of(i) for i in range(first, min(first + ROWS, listed))]
        rows = {t: json.loads(tokens.get(f"{PREFIX}{DONE}{t}.json")) for t in tasks}
        name = f"{PREFIX}{LEDGER}{sha256(str(first).encode())[:16]}.000000.json"
        write(name, seal({"rows": rows}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(part, firsts))
