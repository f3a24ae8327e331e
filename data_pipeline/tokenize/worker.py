"""A worker of the token job: input shard -> output shards, named by a hash of their inputs.

    <split>/<task>-<variant>.tar                  blocks of records; put if absent
    <split>/<task>-<variant>.index.safetensors    block index and ids of the stored tar
    <split>/_rejects/<task>.jsonl                 rejected pairs
    <split>/_done/<task>.json                     the task's manifest entries; put last, if absent
    <split>/_leases/                              task leases (leases.py)

Workers may be killed and restarted, in duplicate or with another count: existing outputs are never
computed again, and a worker that commits second reads back the first one's output. Each worker
starts with its own tasks and continues with all that remain, including those of dead workers.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core.config import check, to_json
from core.errors import AbsentError, CorruptError, InputError
from core.files.atomic import canonical_json, sha256
from core.log import LOG
from core.storage.store import Store
from core.workers import JobWorker
from data_pipeline.config import TokenizeConfig
from data_pipeline.formats.index import read_shard_index
from data_pipeline.formats.manifest import (
    NAME,
    RAW,
    SPLITS,
    TOKENS,
    Shard,
    read_json,
    read_manifest,
)
from data_pipeline.formats.raw import parse_pairs
from data_pipeline.formats.shards import build_tar, describe, list_members, put_manifest
from data_pipeline.formats.tokens import TokenRecord, TokenRecords, decode_block, encode_block
from data_pipeline.tokenize.encode import Encoded, Encoders, encode_pairs
from data_pipeline.tokenize.leases import Leases
from data_pipeline.tokenize.status import DONE, REJECTS, REQUEST

_READERS = 16


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One input shard."""

    split: str
    shard: Shard
    name: str
    """Hash of the shard's content, the models and the settings."""

    @property
    def prefix(self) -> str:
        """Folder of its outputs."""
        return f"{self.split}/"

    @property
    def record(self) -> str:
        """Name of the object that marks it as done."""
        return f"{self.split}/{DONE}{self.name}.json"


class Worker:
    """One worker of the job."""

    def __init__(
        self,
        raw: Store,
        tokens: Store,
        encoders: Encoders,
        config: TokenizeConfig,
        member: JobWorker,
    ) -> None:
        self._raw, self._tokens, self._encoders, self._config = raw, tokens, encoders, config
        self._member = member
        check(encoders.problems())
        self._rejected: Counter[str] = Counter()
        """Pairs rejected by this worker, by split."""
        self._sources = {split: read_manifest(raw, f"{split}/", RAW) for split in SPLITS}
        self._leases = {
            split: Leases(tokens, f"{split}/", config.lease_seconds, member) for split in SPLITS
        }
        facts = {**encoders.facts(config), "v": TOKENS}
        self._tasks = [
            ShardTask(
                split=split,
                shard=shard,
                name=sha256(canonical_json({"input": shard.sha256, **facts})),
            )
            for split, source in self._sources.items()
            for shard in source.shards
        ]

    def run(self, again: bool = False) -> int:
        """Encode unfinished shards, then write the manifests; returns the shards encoded here.

        `again` verifies this worker's finished shards, and encodes damaged ones again.
        Raises: InputError if TOKENS holds tokens of other pairs or models, or too many pairs
        cannot be used.
        """
        torch.set_num_threads(self._config.threads)
        self._claim_place(again)
        if again:
            self._take_back_damaged()
        made = 0
        for task in self._open_tasks():
            lease = self._leases[task.split].claim(task.name)
            if lease is None:
                continue
            progress = {"shard": task.shard.name, "of": task.shard.samples, "pairs": 0}
            with self._leases[task.split].held(lease, progress):
                if not self._tokens.exists(task.record):
                    self._make(task, progress)
                    made += 1
                    LOG.info(
                        "worker %s: %s/%s -> %s",
                        *(self._member.text, task.split, task.shard.name, task.name[:12]),
                    )
        self._finish()
        return made

    def _open_tasks(self) -> Iterator[ShardTask]:
        """Unfinished tasks, own tasks first, until all are done."""
        ours, count = self._member.number, self._member.count
        order = [t for i in range(count) for t in self._tasks[(ours + i) % count :: count]]
        while True:
            done = {n for split in SPLITS for n in self._tokens.names(f"{split}/{DONE}")}
            order = [task for task in order if task.record not in done]
            if not order:
                return
            for task in order:
                if not self._tokens.exists(task.record):
                    yield task
            time.sleep(min(1.0, self._config.lease_seconds / 8))

    def _make(self, task: ShardTask, progress: dict[str, Any]) -> None:
        where = f"{task.split}/{task.shard.name}"
        data = self._raw.get(where)
        if sha256(data) != task.shard.sha256:
            raise CorruptError(
                f"{self._raw.url}/{where} differs from its manifest (sha256 {sha256(data)}, "
                f"expected {task.shard.sha256}); restore it or run its `tapir pack` with --again"
            )
        encoded = encode_pairs(parse_pairs(data), self._encoders, self._config, progress)
        shards = [self._put(task, i, rows) for i, rows in enumerate(encoded.variants)]
        self._put_record(task, shards, encoded)
        if encoded.rejects:
            self._rejected[task.split] += len(encoded.rejects)
            first = encoded.rejects[0]["reason"]
            self._refuse_rejects(task.split, self._rejected[task.split], first)

    def _put(self, task: ShardTask, variant: int, records: list[TokenRecord]) -> Shard:
        size = self._config.block
        groups = [records[i : i + size] for i in range(0, len(records), size)]
        tar = build_tar(
            [
                {"__key__": f"block-{i:06d}", "bin": encode_block(TokenRecords.of(group))}
                for i, group in enumerate(groups)
            ]
        )
        name = f"{task.name}-{variant}.tar"
        if not self._tokens.put(task.prefix + name, tar, if_absent=True):
            tar = self._tokens.get(task.prefix + name)  # another worker wrote it first
        return describe(self._tokens, task.prefix, name, tar, *ranges_of(tar))

    def _put_record(self, task: ShardTask, shards: list[Shard], encoded: Encoded) -> None:
        body = "".join(json.dumps(row) + "\n" for row in encoded.rejects).encode()
        if encoded.rejects:
            self._tokens.put(f"{task.prefix}{REJECTS}{task.name}.jsonl", body)
        record = {
            "shards": [to_json(shard) for shard in shards],
            "rejects": encoded.kinds,
            "rejects_sha256": sha256(body),
            "first_reject": encoded.rejects[0]["reason"] if encoded.rejects else "",
            "numerics": to_json(self._encoders.numerics),
        }
        self._tokens.put(task.record, canonical_json(record), if_absent=True)

    def _finish(self) -> None:
        """Check that every pair is in a record or a reject, and write the manifests."""
        for split, source in self._sources.items():
            tasks = [task for task in self._tasks if task.split == split]
            with ThreadPoolExecutor(_READERS, "records") as pool:
                records = list(pool.map(lambda t: read_json(self._tokens, t.record), tasks))
            variants = self._config.variants
            shards = [Shard(**row["shards"][v]) for v in range(variants) for row in records]
            rejects: Counter[str] = sum((Counter(row["rejects"]) for row in records), Counter())
            samples = sum(shard.samples for shard in shards[: len(tasks)])
            where = f"{self._tokens.url}/{split}"
            if samples + rejects.total() != source.samples:
                raise InputError(
                    f"{where} has {samples} records and {rejects.total()} rejects for "
                    f"{source.samples} pairs; run `tapir tokenize` with --again"
                )
            first = next((row["first_reject"] for row in records if row["first_reject"]), "")
            self._refuse_rejects(split, rejects.total(), first)
            facts = {**self._encoders.facts(self._config), "raw": source.fingerprint}
            facts["split"] = split
            put_manifest(
                *(self._tokens, f"{split}/", TOKENS, shards, facts, dict(rejects), variants),
                numerics=_numerics_of(records),
            )
            self._leases[split].sweep()

    def _refuse_rejects(self, split: str, count: int, first: str) -> None:
        """Raise InputError if a split has more rejects than max_rejects."""
        source, most = self._sources[split], self._config.max_rejects
        if count > most * source.samples:
            raise InputError(
                f"{count} of {source.samples} pairs of {self._tokens.url}/{split} are unusable, "
                f"more than --max-rejects {most}; the first: {first}. Pack with --min-side, or "
                "give a larger --max-rejects: what is made is kept"
            )

    def _take_back_damaged(self) -> None:
        """Delete the done markers and outputs of this worker's damaged shards."""
        for task in self._tasks[self._member.number :: self._member.count]:
            if not self._tokens.exists(task.record):
                continue
            try:
                for row in json.loads(self._tokens.get(task.record))["shards"]:
                    _check(self._tokens, task.prefix, Shard(**row))
            except (AbsentError, CorruptError, ValueError, KeyError, TypeError) as error:
                LOG.info("%s%s is damaged, and is made again: %s", task.prefix, task.name, error)
                for split_name in (NAME, f"{DONE}{task.name}.json"):
                    self._tokens.delete(task.prefix + split_name)
                for name in self._tokens.names(f"{task.prefix}{task.name}"):
                    self._tokens.delete(name)

    def _claim_place(self, again: bool) -> None:
        """Claim TOKENS for these pairs and models; the first job wins."""
        pairs = {split: source.fingerprint for split, source in self._sources.items()}
        counts = {
            split: {"shards": len(source.shards), "pairs": source.samples}
            for split, source in self._sources.items()
        }
        request = canonical_json(
            {**self._encoders.facts(self._config), "raw": pairs, "input": counts}
        )
        if (
            self._tokens.put(REQUEST, request, if_absent=True)
            or self._tokens.get(REQUEST) == request
        ):
            return
        try:
            read_json(self._tokens, REQUEST)
        except CorruptError:
            if not again:
                raise
            self._tokens.put(REQUEST, request)
            return
        raise InputError(
            f"{self._tokens.url} holds tokens of other pairs, or of another dVAE, tokenizer, block "
            "size, precision (in 16 bits: device) or number of variants; choose an empty place for "
            "the tokens"
        )


def ranges_of(tar: bytes) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """(block ranges, record ids in order) of a token shard."""
    ranges, ids = [], [np.zeros(0, np.uint64)]
    for member in list_members(tar):
        block = decode_block(tar[member.start : member.start + member.length])
        ranges.append((member.start, member.length, len(block)))
        ids.append(block.ids)
    return ranges, np.concatenate(ids)


def _numerics_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The distinct numerics of the shards, each with its number of shards."""
    told = Counter(canonical_json(row["numerics"]) for row in records if "numerics" in row)
    return [{**json.loads(text), "shards": count} for text, count in sorted(told.items())]


def _check(store: Store, prefix: str, shard: Shard) -> None:
    read_shard_index(store, prefix, shard)
    if sha256(store.get(prefix + shard.name)) != shard.sha256:
        raise CorruptError(f"{store.url}/{prefix}{shard.name} has another sha256")
