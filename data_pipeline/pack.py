"""`tapir pack SRC DEST`: raw pairs -> WebDataset shards, split by key."""

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from core.errors import InputError, TapirError
from core.files import canonical_json
from core.keys import key_fraction
from core.log import LOG, progress
from core.settings import check, to_json
from core.store import Store
from data_pipeline.captions import clean_caption
from data_pipeline.config import PackConfig
from data_pipeline.images import decode_rgb
from data_pipeline.manifest import NAME, RAW, Manifest, Shard, read_manifest, write_manifest
from data_pipeline.shards import build_tar, list_members, put_shard
from data_pipeline.sources.catalogue import SHAPES_COUNT, open_source, source_content
from data_pipeline.sources.pair import Pair

SPLITS = ("train", "validation")
REJECTS, REQUEST = "rejects.jsonl", "request.json"


class _Split:
    """Collects the pairs of one split and writes a shard whenever one is full."""

    def __init__(self, store: Store, name: str, config: PackConfig) -> None:
        self._store, self._prefix, self._config = store, f"{name}/", config
        self._waiting: list[dict[str, Any]] = []
        self._size = 0
        self.shards: list[Shard] = []

    def add(self, pair: Pair, caption: str) -> None:
        facts = json.dumps({"key": pair.key, "split_key": pair.split_key}, sort_keys=True)
        text = caption.encode()
        self._waiting.append(
            {
                "__key__": pair.key,
                "json": facts.encode(),
                pair.extension: pair.image,
                "txt": text,
            }
        )
        self._size += len(pair.image) + len(text)
        full = self._size >= self._config.shard_megabytes * 2**20
        if full or len(self._waiting) >= self._config.shard_pairs:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        tar = build_tar(self._waiting)
        index = index_pairs(tar)
        name = f"shard-{len(self.shards):06d}.tar"
        self.shards.append(put_shard(self._store, self._prefix, name, tar, index))
        self._waiting, self._size = [], 0


def index_pairs(tar: bytes) -> dict[str, Any]:
    """Index a raw shard: key, image and caption offsets, and a crc32 of each pair's bytes."""
    rows: dict[str, dict[str, Any]] = {}
    for member in list_members(tar):
        key, _, extension = member.name.partition(".")
        rows.setdefault(key, {"key": key})[extension] = [member.start, member.length]
    pairs = []
    for row in rows.values():
        extension = next(name for name in ("png", "jpg", "webp") if name in row)
        image, text = row[extension], row["txt"]
        crc = zlib.crc32(tar[image[0] : sum(image)] + tar[text[0] : sum(text)])
        pairs.append([row["key"], *image, *text, crc])
    return {"samples": len(pairs), "pairs": pairs}


def pack(source: str, store: Store, config: PackConfig, again: bool = False) -> dict[str, Manifest]:
    """Write SRC's pairs to the store; finished work with the same settings is kept.

    `again` writes all of it anew, which mends damaged shards: the same SRC gives the same bytes.
    Raises: InputError for unusable pairs beyond max_rejects, or if DEST holds other data.
    """
    check(config.problems())
    request = {
        "source": source,
        "content": source_content(source),
        "config": {**to_json(config), "cache": ""},
    }
    mine = _claim(store, request)
    finished = {} if again else _finished(store)
    if finished:
        LOG.info("%s already holds this data set", store.url)
        return finished
    try:
        return _write(source, store, config, request)
    except TapirError:
        if mine:
            store.delete(REQUEST)  # what was refused may be mended and packed here
        raise


def _write(
    source: str, store: Store, config: PackConfig, request: dict[str, Any]
) -> dict[str, Manifest]:
    splits = {name: _Split(store, name, config) for name in SPLITS}
    rejects: list[dict[str, str]] = []
    seen = _fill(source, config, splits, rejects)
    if seen == 0:
        raise InputError(f"the source {source!r} holds no pairs")
    if len(rejects) > config.max_rejects * seen:
        raise InputError(
            f"{len(rejects)} of {seen} pairs are unusable, more than max_rejects="
            f"{config.max_rejects}; the first: {rejects[0]['reason']}"
        )
    _refuse_empty(splits, seen, config)
    store.put(REJECTS, "".join(json.dumps(row) + "\n" for row in rejects).encode())
    counts = dict(Counter(row["kind"] for row in rejects))
    return {name: _close(store, name, split, request, counts) for name, split in splits.items()}


def _fill(
    source: str, config: PackConfig, splits: dict[str, _Split], rejects: list[dict[str, str]]
) -> int:
    seen = 0
    keys: set[str] = set()
    expected = config.count or SHAPES_COUNT
    with progress("pack", expected) as meter:
        for pair, caption in _checked(open_source(source, config), rejects, config):
            if pair.key in keys:
                raise InputError(f"the key {pair.key!r} ({pair.where}) occurs twice")
            keys.add(pair.key)
            held_out = key_fraction(config.seed, pair.split_key, "split") < config.validation
            splits["validation" if held_out else "train"].add(pair, caption)
            seen += 1
            meter.update(seen)
    for split in splits.values():
        split.flush()
    return seen + len(rejects)


def _checked(
    pairs: Iterator[Pair], rejects: list[dict[str, str]], config: PackConfig
) -> Iterator[tuple[Pair, str]]:
    for pair in pairs:
        kind = "caption"
        try:
            caption = clean_caption(pair.caption, pair.where)
            kind = "image"
            decode_rgb(pair.image, pair.where)
        except InputError as error:
            if config.max_rejects == 0:
                raise InputError(
                    f"{error}; to leave unusable pairs out and count them, pass --max-rejects 0.01"
                ) from error
            rejects.append({"key": pair.key, "kind": kind, "reason": str(error)})
            continue
        yield pair, caption


def _refuse_empty(splits: dict[str, _Split], seen: int, config: PackConfig) -> None:
    for name, split in splits.items():
        if not split.shards:
            raise InputError(
                f"no pair of {seen} fell into the {name} split; pass another --validation "
                f"(now {config.validation}) or give more pairs"
            )


def _claim(store: Store, request: dict[str, Any]) -> bool:
    """Take DEST for this request, before any work; says whether it was free.

    Raises: InputError if DEST is taken by another request; StoreError if it cannot be written.
    """
    wanted = canonical_json(request)
    if store.put(REQUEST, wanted, if_absent=True):
        return True
    if store.get(REQUEST) == wanted:
        return False
    other = json.loads(store.get(REQUEST))
    raise InputError(
        f"{store.url} is taken by another data set ({other['source']!r}, or other settings or "
        "content); choose an empty DEST"
    )


def _finished(store: Store) -> dict[str, Manifest]:
    found = {}
    for name in SPLITS:
        if not store.exists(f"{name}/{NAME}"):
            return {}
        found[name] = read_manifest(store, f"{name}/", RAW)
    return found


def _close(
    store: Store, name: str, split: _Split, request: dict[str, Any], rejects: dict[str, int]
) -> Manifest:
    manifest = Manifest(
        format=RAW,
        shards=split.shards,
        samples=sum(shard.samples for shard in split.shards),
        facts={"request": request, "split": name},
        rejects=rejects,
    )
    write_manifest(store, f"{name}/", manifest)
    return manifest
