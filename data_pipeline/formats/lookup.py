"""Find a pair by its id: in two small reads of ids.bin, or of each shard's index without it."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from core.errors import InputError
from core.keys import key_int
from core.storage.store import Store
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.ids import find_in_table
from data_pipeline.formats.index import BlockReader
from data_pipeline.formats.manifest import Shard

_HEAD = 2048
_SPREAD = 8
"""Half-width of the search range around an id's expected position, in standard deviations."""
_READERS = 32


def find_pair(store: Store, split: str, blocks: BlockReader, text: str) -> tuple[int, int]:
    """Find a pair by its key or id: (block, position in the block).

    Raises: InputError if the data set has no such pair.
    """
    ids = [key_int(text)]
    if text.isascii() and text.isdecimal() and int(text) < 2**63:
        ids.append(int(text))
    for candidate in ids:
        place = find_record(store, split, blocks, candidate)
        if place is not None:
            return place
    raise InputError(
        f"{store.url}/{split} has no pair of the key or id {text}; give what `tapir batch` prints"
    )


def find_record(
    store: Store, split: str, blocks: BlockReader, target: int
) -> tuple[int, int] | None:
    """Find a record by its id: (block, position in the block), or None."""
    manifest = blocks.manifest
    if manifest.lookup:
        bits = int(manifest.lookup["bits"])
        name = f"{split}/{manifest.file(IDS)}"
        record = find_in_table(store, name, manifest.samples, bits, target)
        return None if record is None else blocks.block_of_record(record)
    shards = manifest.shards[: len(manifest.shards) // manifest.variants]
    with ThreadPoolExecutor(_READERS, "lookup") as pool:
        places = list(pool.map(lambda shard: _place(store, split, shard, target), shards))
    for number, place in enumerate(places):
        if place is not None:
            return blocks.block_of(number, place)
    return None


def _place(store: Store, split: str, shard: Shard, target: int) -> int | None:
    """The position of an id in a shard, or None."""
    count, name = shard.samples, f"{split}/{shard.index_name}"
    if count == 0:
        return None
    head = store.get(name, 0, _HEAD)
    size = int.from_bytes(head[:8], "little")
    if size + 8 > len(head):
        head = store.get(name, 0, size + 8)
    header = json.loads(head[8 : 8 + size])
    expected = int(target / 2**63 * count)
    margin = int(_SPREAD * (count**0.5 + 1))
    low, high = max(0, expected - margin), min(count, expected + margin)
    ids = _rows(store, name, header["ids"], size + 8, low, high, np.uint64)
    if (low > 0 and ids[0] > target) or (high < count and ids[-1] < target):
        low, ids = 0, _rows(store, name, header["ids"], size + 8, 0, count, np.uint64)
    at = int(np.searchsorted(ids, np.uint64(target)))
    if at == len(ids) or int(ids[at]) != target:
        return None
    return int(_rows(store, name, header["places"], size + 8, low + at, low + at + 1, np.uint32)[0])


def _rows(
    store: Store, name: str, field: Any, base: int, low: int, high: int, kind: type
) -> np.ndarray:
    width = np.dtype(kind).itemsize
    start = base + field["data_offsets"][0] + low * width
    return np.frombuffer(store.get(name, start, (high - low) * width), kind)
