"""Ranks that train a prior while its token set grows: they record what they read, and may die."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.support.synthetic import write_tokens
from core.storage.store import FolderStore
from data_pipeline.formats.manifest import NAME, TOKENS, read_manifest
from training import worker
from training.run.feed import Feed, StepData

RECORDS, BLOCK = 32, 4
"""Records of a shard, and of a block."""


def write_version(data: Path, shards: int) -> None:
    """Write a token set of so many shards, or its next version; that of train last."""
    store = FolderStore(data)
    for split, count in (("validation", 1), ("train", shards)):
        parent = None
        if store.exists(f"{split}/{NAME}"):
            parent = read_manifest(store, f"{split}/", TOKENS)
        write_tokens(store, count, RECORDS, BLOCK, 2, 3, split, parent)


def train(payload: str) -> None:
    """Train; `grow`: the step before which rank 0 writes a version, and its shards; `dies`: the
    step before which all ranks end without a word."""
    body, rank = json.loads(payload), int(os.environ["RANK"])
    out, steps = Path(body["out"]), Feed.steps
    grows = {int(step): shards for step, shards in body["grow"].items()}

    def recorded(self: Feed, step: int) -> Iterator[StepData]:
        for number, data in enumerate(steps(self, step), step + 1):
            if number == body["dies"]:
                os._exit(0)
            if number in grows and rank == 0:
                write_version(Path(body["data"]), grows[number])
            ids = getattr(data.records, "ids", None)
            row = {"step": number, "ids": [] if ids is None else ids.tolist()}
            with open(out / f"read-{body['attempt']}-{rank}.jsonl", "a") as notes:
                notes.write(json.dumps(row) + "\n")
            yield data

    feed: Any = Feed
    feed.steps = recorded
    worker.run(body["train"])
