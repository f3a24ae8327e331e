"""A worker of the token job: input shard -> output shards, named by a hash of their inputs.

    <split>/<task>-<variant>.tar                  blocks of records; put if absent
    <split>/<task>-<variant>.index.safetensors    block index and ids of the stored tar
    <split>/_rejects/<task>.jsonl                 rejected pairs
    <split>/_done/, _ledger/, _leases/            those of every job (jobs/worker.py)

A worker that commits second reads back the first one's output. One of them writes the manifests
(finish.py).
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core.config import check, to_json
from core.errors import CorruptError
from core.files.atomic import canonical_json, sha256
from core.storage.store import Store
from core.workers import JobWorker
from data_pipeline.config import TokenizeConfig
from data_pipeline.formats.index import read_shard_index
from data_pipeline.formats.manifest import SPLITS, TOKENS, Shard, shard_json
from data_pipeline.formats.raw_shards import RawShards
from data_pipeline.formats.shards import build_tar, describe, list_members
from data_pipeline.formats.tokens import TokenRecord, TokenRecords, decode_block, encode_block
from data_pipeline.jobs.finish import Finisher
from data_pipeline.jobs.ledger import Record
from data_pipeline.jobs.worker import Job, Progress, Task, Work
from data_pipeline.tokenize.encode import Encoders, encode_pairs
from data_pipeline.tokenize.finish import ManifestWriter, refuse_rejects
from data_pipeline.tokenize.goal import Goal, claim_goal

REJECTS = "_rejects/"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask(Task):
    """One input shard; its name is the hash of the shard's content, the models and the settings."""

    number: int
    """Of the shard in its split."""

    @staticmethod
    def of(split: str, number: int, source: RawShards, facts: dict[str, Any]) -> "ShardTask":
        """The task of a raw shard; `facts` are those of models and settings."""
        shard, prefix = source.manifest.shards[number], f"{split}/"
        name = sha256(canonical_json({"input": source.digest(number), **facts}))
        shown = prefix + shard.name
        return ShardTask(prefix=prefix, name=name, shown=shown, size=shard.samples, number=number)

    @property
    def split(self) -> str:
        return self.prefix.removesuffix("/")


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
        check(encoders.problems(config))
        self._rejected: Counter[str] = Counter()
        """Pairs rejected by this worker, by split."""
        self._goal: Goal
        self._sources: dict[str, RawShards]

    def run(self, again: bool = False) -> int:
        """Encode unfinished shards, then write the manifests; returns the shards encoded here.

        `again` verifies this worker's finished shards, and encodes damaged ones again; worker 0
        writes the manifests again.
        Raises: InputError if TOKENS holds tokens of other pairs or models, or too many pairs
        cannot be used.
        """
        torch.set_num_threads(self._config.threads)
        made = 0
        while True:
            facts = self._encoders.facts(self._config)
            self._goal = claim_goal(self._raw, self._tokens, facts, again)
            made += self._run(again)
            if self._goal.is_newest:
                return made

    def _run(self, again: bool) -> int:
        """Finish one version of the token set."""
        facts = {**self._encoders.facts(self._config), "v": TOKENS}
        self._sources = {
            split: RawShards(self._raw, split, manifest)
            for split, manifest in self._goal.raw.items()
        }
        tasks = [
            ShardTask.of(split, number, source, facts)
            for split, source in self._sources.items()
            for number in range(len(source.manifest.shards))
        ]
        job = Job(self._tokens, tasks, self._member, self._config.lease_seconds)
        finishers = [self._finisher(job, split, not again) for split in SPLITS]
        if again:
            job.repair(self._check, self._outputs, finishers)
        return job.run(Work(make=self._make, judge=self._judge), finishers, again)

    def _finisher(self, job: Job[ShardTask], split: str, ledgers: bool) -> Finisher:
        prefix, raw = f"{split}/", self._goal.raw[split]
        facts = {**self._encoders.facts(self._config), "raw": raw.fingerprint, "split": split}
        tasks = [task.name for task in job.tasks if task.prefix == prefix]
        parent = self._goal.parent(self._tokens, split)
        writer = ManifestWriter(
            self._tokens, raw.samples, tasks, facts, self._config, ledgers, parent
        )
        return job.finisher(prefix, self._goal.result(split), writer.write)

    def _make(self, task: ShardTask, progress: Progress) -> Record:
        records = self._sources[task.split].records(task.number)
        encoded = encode_pairs(records, self._encoders, self._config, progress)
        shards = [self._put(task, i, rows) for i, rows in enumerate(encoded.variants)]
        body = "".join(json.dumps(row) + "\n" for row in encoded.rejects).encode()
        if encoded.rejects:
            self._tokens.put(f"{task.prefix}{REJECTS}{task.name}.jsonl", body)
        return {
            "shards": [shard_json(shard) for shard in shards],
            "rejects": encoded.kinds,
            "rejects_sha256": sha256(body),
            "first_reject": encoded.rejects[0]["reason"] if encoded.rejects else "",
            "numerics": to_json(self._encoders.numerics),
        }

    def _judge(self, task: ShardTask, record: Record) -> None:
        """Refuse more rejects of this worker than the whole split may have."""
        if count := sum(record["rejects"].values()):
            split = task.split
            self._rejected[split] += count
            where, first = f"{self._tokens.url}/{split}", record["first_reject"]
            pairs = self._goal.raw[split].samples
            refuse_rejects(where, self._rejected[split], pairs, self._config, first)

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

    def _outputs(self, task: ShardTask) -> list[str]:
        return self._tokens.names(f"{task.prefix}{task.name}")

    def _check(self, task: ShardTask, record: Record) -> None:
        """Raise CorruptError if an output differs from the task's record."""
        for row in record["shards"]:
            shard = Shard(**row)
            read_shard_index(self._tokens, task.prefix, shard)
            if sha256(self._tokens.get(task.prefix + shard.name)) != shard.sha256:
                where = f"{self._tokens.url}/{task.prefix}{shard.name}"
                raise CorruptError(f"{where} has another sha256")


def ranges_of(tar: bytes) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """(block ranges, record ids in order) of a token shard."""
    ranges, ids = [], [np.zeros(0, np.uint64)]
    for member in list_members(tar):
        block = decode_block(tar[member.start : member.start + member.length])
        ranges.append((member.start, member.length, len(block)))
        ids.append(block.ids)
    return ranges, np.concatenate(ids)
