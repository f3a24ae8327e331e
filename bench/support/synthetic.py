"""Token data sets of random records, written by the project's own writers, for benchmarks."""

from collections.abc import Iterator

import numpy as np

from core.keys import KeyPart, key_int, keyed_rng
from core.storage.store import Store
from data_pipeline.formats.manifest import TOKENS, Manifest
from data_pipeline.formats.shards import build_tar, describe, put_manifest
from data_pipeline.formats.tokens import TokenRecords, encode_block
from data_pipeline.tokenize.worker import ranges_of

VOCABULARY = 8192


def records_of(shard: int, count: int, image: int, text: int, *seed: KeyPart) -> TokenRecords:
    """The records of a shard: `image` codes and `text` ids each, of key (*seed, shard, place)."""
    rng = keyed_rng(*seed, shard, "synthetic")
    codes = rng.integers(0, VOCABULARY, (count, image), np.uint16)
    ids = np.array([key_int(*seed, shard, place) for place in range(count)], np.uint64)
    flat = rng.integers(0, VOCABULARY, count * text, np.uint16)
    return TokenRecords(ids, codes, flat, np.arange(count + 1) * text)


def write_tokens(
    store: Store,
    shards: int,
    count: int,
    block: int,
    grid: int = 32,
    text: int = 256,
    split: str = "train",
    parent: Manifest | None = None,
    seed: str = "",
) -> Manifest:
    """Write a split of `shards` x `count` records; other seeds have other ones.

    `parent`: its version with fewer shards.
    """
    described = []
    for shard in range(shards):
        records = records_of(shard, count, grid * grid, text, *([seed] if seed else []))
        tar = build_tar(list(_blocks(records, block)))
        name = f"shard-{shard:06d}.tar"
        store.put(f"{split}/{name}", tar)
        described.append(describe(store, f"{split}/", name, tar, *ranges_of(tar)))
    facts: dict[str, int | str]
    facts = {"grid": grid, "text_vocabulary": VOCABULARY, "image_vocabulary": VOCABULARY}
    facts |= {"dvae": "none", "tokenizer": "none"}
    return put_manifest(store, f"{split}/", TOKENS, described, facts, {}, parent=parent)


def _blocks(records: TokenRecords, block: int) -> Iterator[dict[str, object]]:
    for i in range(0, len(records), block):
        yield {"__key__": f"block-{i:06d}", "bin": encode_block(records[i : i + block])}
