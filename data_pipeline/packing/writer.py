"""Writes the pairs of one split as shards, each built in memory and put when it is full."""

import json
from typing import Any

import numpy as np

from core.keys import key_int
from core.storage.store import Store
from data_pipeline.config import PackConfig
from data_pipeline.formats.manifest import Shard
from data_pipeline.formats.shards import TarBuffer, describe
from data_pipeline.sources.pair import Pair

_JSON = json.JSONEncoder(sort_keys=True)


class RawWriter:
    """Collects the pairs of one split of a unit and writes a shard when it is full.

    Memory: one shard. Equal pairs give equal bytes, so that a shard may be written twice.
    """

    def __init__(self, store: Store, split: str, config: PackConfig, unit: int = 0) -> None:
        self._store, self._prefix, self._config, self._unit = store, f"{split}/", config, unit
        self.shards: list[Shard] = []
        self._begin()

    def _begin(self) -> None:
        self._tar = TarBuffer()
        self._starts: list[int] = []
        self._keys: list[str] = []

    def add(self, pair: Pair, *captions: str) -> None:
        """Add a pair with its cleaned captions; the .json lists them if there are several."""
        facts: dict[str, Any] = {"key": pair.key, "split_key": pair.split_key}
        if len(captions) > 1:
            facts["captions"] = captions
        members = {
            "json": _JSON.encode(facts).encode(),
            pair.extension: pair.image,
            "txt": captions[0].encode(),
        }
        self._starts.append(self._tar.size)
        self._keys.append(pair.key)
        for extension in sorted(members):
            self._tar.add(f"{pair.key}.{extension}", members[extension])
        full = self._tar.size >= self._config.shard_megabytes * 2**20
        if full or len(self._keys) >= self._config.shard_pairs:
            self.flush()

    def flush(self) -> None:
        """Write the collected pairs as a shard."""
        if not self._keys:
            return
        ends = [*self._starts[1:], self._tar.size]
        block = self._config.block
        runs = [
            (self._starts[i : i + block], ends[i : i + block]) for i in range(0, len(ends), block)
        ]
        ranges = [(first[0], last[-1] - first[0], len(first)) for first, last in runs]
        ids = np.array([key_int(key) for key in self._keys], np.uint64)
        part = f"-{len(self.shards):03d}" if self.shards else ""
        name, tar = f"shard-{self._unit:06d}{part}.tar", self._tar.finish()
        self._begin()
        self._store.put(self._prefix + name, tar)
        self.shards.append(describe(self._store, self._prefix, name, tar, ranges, ids))
