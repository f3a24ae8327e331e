"""A worker of the token job: input shard -> output shards, named by a hash of their inputs.

    <split>/<task>-<variant>.tar                  blocks of records; put if absent
    <split>/<task>-<variant>.index.safetensors    block index and ids of the stored tar
    <split>/_rejects/<task>.jsonl                 rejected pairs
    <split>/_done/, <split>/_ledger/              what is done (ledger.py); put last
    <split>/_leases/                              task leases (leases.py)

Workers may be killed and restarted, in duplicate or with another count: existing outputs are never
computed again, and a worker that commits second reads back the first one's output. Each worker
starts with its own tasks and continues with all that remain, including those of dead workers. One
of them writes the manifests (finish.py).
"""

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core.config import check, to_json
from core.errors import AbsentError, CorruptError, InputError
from core.files.atomic import canonical_json, sha256
from core.keys import keyed_rng
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
from data_pipeline.formats.shards import build_tar, describe, list_members
from data_pipeline.formats.tokens import TokenRecord, TokenRecords, decode_block, encode_block
from data_pipeline.tokenize.encode import Encoded, Encoders, encode_pairs
from data_pipeline.tokenize.finish import Finisher, refuse_rejects
from data_pipeline.tokenize.leases import Leases
from data_pipeline.tokenize.ledger import DONE, REJECTS, Ledger, done_tasks
from data_pipeline.tokenize.status import REQUEST

_REFUSED = 8
"""Shards of other workers that are tried before the next look at what is done."""
_LISTING = 0.05
"""Maximum fraction of the time that is spent on listing what is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """One input shard."""

    split: str
    shard: str
    """Its file."""
    samples: int
    sha256: str
    name: str
    """Hash of the shard's content, the models and the settings."""

    @staticmethod
    def of(split: str, shard: Shard, facts: dict[str, Any]) -> "ShardTask":
        """The task of a raw shard; `facts` are those of models and settings."""
        name = sha256(canonical_json({"input": shard.sha256, **facts}))
        return ShardTask(
            split=split, shard=shard.name, samples=shard.samples, sha256=shard.sha256, name=name
        )

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
        self._leases = {
            split: Leases(tokens, f"{split}/", config.lease_seconds, member) for split in SPLITS
        }
        self._ledgers = {split: Ledger(tokens, f"{split}/") for split in SPLITS}
        self._tasks: list[ShardTask] = []
        self._pairs: dict[str, int] = {}
        self._fingerprints: dict[str, str] = {}
        facts = {**encoders.facts(config), "v": TOKENS}
        for split in SPLITS:
            source = read_manifest(raw, f"{split}/", RAW)
            self._pairs[split], self._fingerprints[split] = source.samples, source.fingerprint
            self._tasks += [ShardTask.of(split, shard, facts) for shard in source.shards]

    def run(self, again: bool = False) -> int:
        """Encode unfinished shards, then write the manifests; returns the shards encoded here.

        `again` verifies this worker's finished shards, and encodes damaged ones again; worker 0
        writes the manifests again.
        Raises: InputError if TOKENS holds tokens of other pairs or models, or too many pairs
        cannot be used.
        """
        torch.set_num_threads(self._config.threads)
        self._claim_place(again)
        if again:
            self._take_back_damaged()
        finishers, made = [self._finisher(split, not again) for split in SPLITS], 0
        again = again and self._member.number == 0  # one worker writes the manifests anew
        while again or not all(finisher.finished() for finisher in finishers):
            made += self._make_open()
            whole = all(finisher.finish(again) for finisher in finishers)
            again = again and not whole
        for finisher in finishers:
            finisher.sweep()
        return made

    def _finisher(self, split: str, ledgers: bool) -> Finisher:
        raw = self._fingerprints[split]
        facts = {**self._encoders.facts(self._config), "raw": raw, "split": split}
        tasks = [task.name for task in self._tasks if task.split == split]
        pairs, leases = self._pairs[split], self._leases[split]
        return Finisher(self._tokens, pairs, tasks, facts, self._config, leases, ledgers)

    def _make_open(self) -> int:
        """Make shards until all have a marker; returns how many were made here."""
        made = passes = 0
        while True:
            began, before = time.monotonic(), made
            done = {split: done_tasks(self._tokens, f"{split}/") for split in SPLITS}
            left = [task for task in self._tasks if task.name not in done[task.split]]
            if not left:
                return made
            now = time.monotonic()
            pause = max(min(1.0, self._config.lease_seconds / 8), (now - began) / _LISTING)
            refused, passes = 0, passes + 1
            for task in self._in_turn(left, passes):
                taken = self._take(task)
                made, refused = made + taken, refused + (not taken)
                if refused == _REFUSED or time.monotonic() > now + pause:
                    break
            if made == before:
                time.sleep(pause)

    def _in_turn(self, tasks: list[ShardTask], number: int) -> list[ShardTask]:
        """This worker's tasks, then those of the others in an order of its own."""
        own = {task.record for task in self._tasks[self._member.number :: self._member.count]}
        mine = [task for task in tasks if task.record in own]
        others = [task for task in tasks if task.record not in own]
        order = keyed_rng(self._member.number, number, "steal").permutation(len(others))
        return mine + [others[i] for i in order]

    def _take(self, task: ShardTask) -> bool:
        """Make a shard, unless another worker holds its lease or has made it."""
        lease = self._leases[task.split].claim(task.name)
        if lease is None:
            return False
        progress = {"shard": task.shard, "of": task.samples, "pairs": 0}
        with self._leases[task.split].held(lease, progress):
            if self._tokens.exists(task.record):
                return False
            self._make(task, progress)
        LOG.info(
            "worker %s: %s/%s -> %s",
            *(self._member.text, task.split, task.shard, task.name[:12]),
        )
        return True

    def _make(self, task: ShardTask, progress: dict[str, Any]) -> None:
        where = f"{task.split}/{task.shard}"
        data = self._raw.get(where)
        if sha256(data) != task.sha256:
            raise CorruptError(
                f"{self._raw.url}/{where} differs from its manifest (sha256 {sha256(data)}, "
                f"expected {task.sha256}); restore it or run its `tapir pack` with --again"
            )
        encoded = encode_pairs(parse_pairs(data), self._encoders, self._config, progress)
        shards = [self._put(task, i, rows) for i, rows in enumerate(encoded.variants)]
        self._put_record(task, shards, encoded)
        if encoded.rejects:
            self._rejected[task.split] += len(encoded.rejects)
            where = f"{self._tokens.url}/{task.split}"
            pairs, first = self._pairs[task.split], encoded.rejects[0]["reason"]
            refuse_rejects(where, self._rejected[task.split], pairs, self._config, first)

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
        self._ledgers[task.split].commit(task.name, record)

    def _take_back_damaged(self) -> None:
        """Delete the done markers and outputs of this worker's damaged shards."""
        done = {split: done_tasks(self._tokens, f"{split}/") for split in SPLITS}
        for task in self._tasks[self._member.number :: self._member.count]:
            if task.name not in done[task.split]:
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
        shards = Counter(task.split for task in self._tasks)
        counts = {split: {"shards": shards[split], "pairs": self._pairs[split]} for split in SPLITS}
        request = canonical_json(
            {**self._encoders.facts(self._config), "raw": self._fingerprints, "input": counts}
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


def _check(store: Store, prefix: str, shard: Shard) -> None:
    read_shard_index(store, prefix, shard)
    if sha256(store.get(prefix + shard.name)) != shard.sha256:
        raise CorruptError(f"{store.url}/{prefix}{shard.name} has another sha256")
