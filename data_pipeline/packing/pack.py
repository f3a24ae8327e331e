"""`tapir pack SRC DEST`: raw pairs -> WebDataset shards, split by key.

<split>/shard-000000.tar     KEY.jpg|png|webp, KEY.json, KEY.txt: any WebDataset reader reads it
<split>/*.index.safetensors  block index of a shard, and of the data set
<split>/ids.bin              the record of each id (formats/ids.py)
<split>/manifest.json        written last
rejects/000000.jsonl         rejected pairs: key, kind, reason
"""

import json
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.config import check, to_json
from core.errors import CorruptError, InputError
from core.files.atomic import canonical_json
from core.keys import key_fraction, key_int
from core.log import LOG, progress
from core.storage.store import FolderStore, Store
from data_pipeline.config import SHAPES_COUNT, FilterConfig, PackConfig
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.manifest import (
    INDEX,
    NAME,
    RAW,
    SPLITS,
    Manifest,
    Shard,
    read_json,
    read_manifest,
)
from data_pipeline.formats.raw_set import write_split
from data_pipeline.formats.shards import build_tar, describe, list_members
from data_pipeline.images.decode import inspect
from data_pipeline.packing.filters import Duplicates, Reject, caption_reject, image_reject
from data_pipeline.packing.rejects import REJECTS, Keys, Rejects
from data_pipeline.sources.catalogue import open_source, source_content
from data_pipeline.sources.pair import Pair, Unusable, printable
from data_pipeline.text.captions import clean_captions

REQUEST = "request.json"
_PARTS = re.compile(
    rf"({'|'.join(SPLITS)})/shard-\d{{6}}\.(tar|index\.safetensors)|{REJECTS}\d{{6}}\.jsonl"
)
_OURS = re.compile(rf"{_PARTS.pattern}|({'|'.join(SPLITS)})/({INDEX}|{IDS})|{REQUEST}")
_NOT_ASKED = ("cache", "threads")
"""Settings that do not affect the output."""


@dataclass(frozen=True, kw_only=True)
class _Examined:
    """A usable pair."""

    pair: Pair
    captions: tuple[str, ...]
    look: bytes


class RawWriter:
    """Collects the pairs of one split and writes a shard when it is full."""

    def __init__(self, store: Store, name: str, config: PackConfig) -> None:
        self._store, self._prefix, self._config = store, f"{name}/", config
        self._waiting: list[dict[str, Any]] = []
        self._size = 0
        self.shards: list[Shard] = []
        self.several = 0
        """Pairs with several captions."""

    def add(self, pair: Pair, *captions: str) -> None:
        """Add a pair with its cleaned captions; the .json lists them if there are several."""
        facts: dict[str, Any] = {"key": pair.key, "split_key": pair.split_key}
        if len(captions) > 1:
            facts["captions"] = captions
            self.several += 1
        self._waiting.append(
            {
                "__key__": pair.key,
                "json": json.dumps(facts, sort_keys=True).encode(),
                pair.extension: pair.image,
                "txt": captions[0].encode(),
            }
        )
        self._size += len(pair.image) + sum(len(text.encode()) for text in captions)
        full = self._size >= self._config.shard_megabytes * 2**20
        if full or len(self._waiting) >= self._config.shard_pairs:
            self.flush()

    def flush(self) -> None:
        """Write the collected pairs as a shard."""
        if not self._waiting:
            return
        tar = build_tar(self._waiting)
        ids = np.array([key_int(sample["__key__"]) for sample in self._waiting], np.uint64)
        ranges = pair_ranges(tar, self._config.block)
        name = f"shard-{len(self.shards):06d}.tar"
        self._store.put(self._prefix + name, tar)
        self.shards.append(describe(self._store, self._prefix, name, tar, ranges, ids))
        self._waiting, self._size = [], 0


def pair_ranges(tar: bytes, block: int) -> list[tuple[int, int, int]]:
    """Cut a raw shard into runs of `block` pairs: (start, bytes, pairs)."""
    pairs: list[tuple[int, int]] = []
    key = ""
    for member in list_members(tar):
        name = member.name.partition(".")[0]
        begin = pairs.pop()[0] if name == key and pairs else member.header
        pairs.append((begin, member.end))
        key = name
    runs = [pairs[i : i + block] for i in range(0, len(pairs), block)]
    return [(run[0][0], run[-1][1] - run[0][0], len(run)) for run in runs]


def pack(source: str, store: Store, config: PackConfig, again: bool = False) -> dict[str, Manifest]:
    """Write SRC's pairs to the store; finished work with the same settings is kept.

    `again` writes everything again, which repairs damaged shards: equal SRC, equal bytes.
    Raises: InputError for unusable pairs beyond max_rejects, or if DEST holds other data.
    """
    check(config.problems())
    _refuse_inside(source, store)
    request = {
        "source": printable(source),
        "content": source_content(source),
        "config": {k: v for k, v in to_json(config).items() if k not in _NOT_ASKED},
    }
    claim(store, request, again)
    manifests = finished(store)
    if manifests and manifests["train"].facts.get("request") != request:
        raise _taken(store, manifests["train"].facts.get("request", {}))
    if manifests and not again:
        LOG.info("%s already holds this data set", store.url)
        return manifests
    with given_back(store):
        return _write(source, store, config, request)


@contextmanager
def given_back(store: Store) -> Iterator[None]:
    """Delete a claimed, unfinished data set on an InputError, so that DEST can be used again."""
    try:
        yield
    except InputError:
        if not finished(store):
            for name in filter(_OURS.fullmatch, store.names()):
                store.delete(name)
        raise


def _refuse_inside(source: str, store: Store) -> None:
    root = Path(source).resolve()
    if isinstance(store, FolderStore) and root.is_dir():
        where = store.root.resolve()
        if where.is_relative_to(root):
            raise InputError(f"DEST {where} is inside SRC {root}; give a place outside of it")


def _write(
    source: str, store: Store, config: PackConfig, request: dict[str, Any]
) -> dict[str, Manifest]:
    splits = {name: RawWriter(store, name, config) for name in SPLITS}
    rejects = Rejects(store, config.max_rejects)
    packed = _fill(source, config, splits, rejects)
    seen = packed + rejects.unusable
    if seen == 0:
        asked = f"; left out: {dict(rejects.kinds)}" if rejects.kinds else ""
        raise InputError(f"the source {source!r} holds no pairs: no images with captions{asked}")
    if rejects.unusable > config.max_rejects * seen:
        raise InputError(
            f"{rejects.unusable} of {seen} pairs are unusable, more than max_rejects="
            f"{config.max_rejects}; the first: {rejects.first}"
        )
    shards = {name: split.shards for name, split in splits.items()}
    refuse_empty(shards, f"pass another --validation (now {config.validation}) or give more pairs")
    rejects.flush()
    several = sum(split.several for split in splits.values())
    if several:
        LOG.info("%d pairs have several captions; one is drawn by key at each reading", several)
    facts = {name: {"request": request, "split": name} for name in SPLITS}
    return close_set(store, shards, facts, rejects)


def close_set(
    store: Store, shards: dict[str, list[Shard]], facts: dict[str, dict[str, Any]], rejects: Rejects
) -> dict[str, Manifest]:
    """Write both splits' manifests, and delete shards of an earlier, unfinished attempt."""
    manifests = {
        name: write_split(store, f"{name}/", [rows], facts[name], dict(rejects.kinds))
        for name, rows in shards.items()
    }
    kept = {f"{name}/{shard.name}" for name, rows in shards.items() for shard in rows}
    kept |= {f"{name}/{shard.index_name}" for name, rows in shards.items() for shard in rows}
    kept |= {rejects.part(number) for number in range(rejects.parts)}
    for name in filter(_PARTS.fullmatch, store.names()):
        if name not in kept:
            store.delete(name)
    return manifests


def _fill(source: str, config: PackConfig, splits: dict[str, RawWriter], rejects: Rejects) -> int:
    packed = 0
    keys, duplicates = Keys(), Duplicates(config.filters)
    with progress("pack", config.count or (SHAPES_COUNT if source == "shapes" else 0)) as meter:
        for item in _examined(open_source(source, config), config):
            if isinstance(item, tuple):
                rejects.add(*item)
                continue
            pair = item.pair
            if not keys.add(pair.key):
                reason = f"the key {pair.key!r} ({pair.where}) occurs twice; give it another name"
                rejects.add(Unusable(key=pair.key, kind="key", reason=reason))
                continue
            text = "\n".join(item.captions)
            double = duplicates.reject(pair.key, pair.image, text, item.look)
            if double:
                rejects.add(Unusable(key=pair.key, **vars(double)), True)
                continue
            held_out = key_fraction(config.seed, pair.split_key, "split") < config.validation
            splits["validation" if held_out else "train"].add(pair, *item.captions)
            packed += 1
            meter.update(packed)
            if packed == config.count:
                break
    for split in splits.values():
        split.flush()
    return packed


def _examined(
    items: Iterator[Pair | Unusable], config: PackConfig
) -> Iterator[_Examined | tuple[Unusable, bool]]:
    """Examine items in threads, in source order: yields a pair, or (reject, from a filter)."""
    with ThreadPoolExecutor(config.threads, "examine") as pool:
        waiting: deque[Future[_Examined | tuple[Unusable, bool]]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_examine, item, config.filters))
                if len(waiting) > 4 * config.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _examine(item: Pair | Unusable, filters: FilterConfig) -> _Examined | tuple[Unusable, bool]:
    if isinstance(item, Unusable):
        return item, False
    kind = "caption"
    try:
        captions = clean_captions(item.caption, item.where)
        kind = "image"
        image = inspect(item.image, item.where)
    except InputError as error:
        return Unusable(key=item.key, kind=kind, reason=str(error)), False
    refused = [caption_reject(caption, filters) for caption in captions]
    kept = tuple(c for c, reject in zip(captions, refused, strict=True) if reject is None)
    reject: Reject | None = image_reject(image, filters) if kept else refused[0]
    if reject:
        return Unusable(key=item.key, **vars(reject)), True
    return _Examined(pair=item, captions=kept, look=image.look)


def refuse_empty(shards: dict[str, list[Shard]], advice: str) -> None:
    """Raise InputError if a split has no pair."""
    for name, rows in shards.items():
        if not rows:
            raise InputError(f"no pair fell into the {name} split; {advice}")


def claim(store: Store, request: dict[str, Any], again: bool = False) -> None:
    """Claim DEST for this request, before any work; the same request may claim it again.

    Raises: InputError if DEST is taken by another request; StoreError if it cannot be written.
    """
    content = canonical_json(request)
    if not store.exists(REQUEST):
        others = [name for split in SPLITS for name in store.names(f"{split}/")]
        if others:
            raise InputError(f"{store.url} holds other files ({others[0]}); choose an empty DEST")
        if store.put(REQUEST, content, if_absent=True):
            return
    if store.get(REQUEST) == content:
        return
    try:
        other = read_json(store, REQUEST)
    except CorruptError:
        if not again:
            raise
        store.put(REQUEST, content)
        return
    raise _taken(store, other)


def _taken(store: Store, other: dict[str, Any]) -> InputError:
    return InputError(
        f"{store.url} is taken by another data set ({other.get('source', 'tokens')!r}, or other "
        "settings or content); choose an empty DEST"
    )


def finished(store: Store) -> dict[str, Manifest]:
    """The manifests of a raw data set; empty unless it is finished."""
    manifests = {}
    for name in SPLITS:
        if not store.exists(f"{name}/{NAME}"):
            return {}
        manifests[name] = read_manifest(store, f"{name}/", RAW)
    return manifests
