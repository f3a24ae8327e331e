"""The end of a token job: a split's manifest, from the records of its shards in their order.

Requests: the listing, a read of each part of the ledgers, one of each shard's index, and, for the
entropy, of the first FIRST_BLOCKS blocks with their markers and indexes.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from core.errors import AbsentError, CorruptError, InputError
from core.files.atomic import canonical_json
from core.log import LOG
from core.storage.store import Store
from data_pipeline.config import TokenizeConfig
from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.index import BlockReader, joined, read_shard_index
from data_pipeline.formats.manifest import TOKENS, Manifest, Shard, read_json
from data_pipeline.formats.shards import put_manifest
from data_pipeline.formats.tokens import codes_per_image, decode_block
from data_pipeline.jobs.ledger import DONE, Record, finished_tasks
from data_pipeline.tokenize.figures import ENTROPY, FIRST_BLOCKS, per_position_entropy


@dataclass
class _Outputs:
    """What the workers made of a split, in the order of its raw shards."""

    shards: list[list[Shard | None]]
    """For each variant, the shards."""
    rejects: Counter[str] = field(default_factory=Counter)
    numerics: Counter[bytes] = field(default_factory=Counter)
    first_reject: tuple[int, str] | None = None
    """(number of the shard, reason)."""

    def add(self, number: int, record: Record) -> None:
        """Add the record of a raw shard."""
        for row, shard in zip(self.shards, record["shards"], strict=True):
            row[number] = Shard(**shard)
        self.rejects.update(record["rejects"])
        if "numerics" in record:
            self.numerics[canonical_json(record["numerics"])] += 1
        reason = record["first_reject"]
        if reason and (self.first_reject is None or number < self.first_reject[0]):
            self.first_reject = number, reason

    @property
    def whole(self) -> list[Shard] | None:
        """All shards, grouped by variant; None if one is missing."""
        shards = [shard for row in self.shards for shard in row if shard is not None]
        return shards if len(shards) == sum(map(len, self.shards)) else None


class ManifestWriter:
    """Writes the manifest of one split when all of its shards are done."""

    def __init__(
        self,
        tokens: Store,
        pairs: int,
        tasks: list[str],
        facts: dict[str, Any],
        config: TokenizeConfig,
        ledgers: bool = True,
        parent: Manifest | None = None,
    ) -> None:
        """`pairs` and `tasks`: of the raw split, in order; `facts`: those of the manifest.

        `parent`: the version before of a set that has grown.

        Without `ledgers` the markers alone are read: a worker that runs on while --again makes a
        shard anew may write its old record once more.
        """
        self._tokens, self._pairs, self._tasks, self._facts = tokens, pairs, tasks, facts
        self._config, self._prefix, self._ledgers = config, f"{facts['split']}/", ledgers
        self._parent = parent

    def write(self) -> bool:
        """Write the index, ids.bin and the manifest; False if a shard is not done.

        Raises: InputError if pairs are missing, double or too many of them cannot be used.
        """
        try:
            figures = self._figures()
            outputs = self._outputs()
        except AbsentError:
            return False
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(
                f"a record of {self._tokens.url}/{self._prefix} is damaged ({error}); run `tapir "
                "tokenize` with --again"
            ) from error
        shards = outputs.whole
        if shards is None:
            return False
        rejects = outputs.rejects
        samples = sum(shard.samples for shard in shards[: len(self._tasks)])
        where = f"{self._tokens.url}/{self._facts['split']}"
        if samples + rejects.total() != self._pairs:
            raise InputError(
                f"{where} has {samples} records and {rejects.total()} rejects for "
                f"{self._pairs} pairs; run `tapir tokenize` with --again"
            )
        first = outputs.first_reject[1] if outputs.first_reject else ""
        refuse_rejects(where, rejects.total(), self._pairs, self._config, first)
        numerics = [
            {**json.loads(text), "shards": count}
            for text, count in sorted(outputs.numerics.items())
        ]
        del outputs
        put_manifest(
            *(self._tokens, self._prefix, TOKENS, shards, self._facts, dict(rejects)),
            *(self._config.variants, numerics, figures, self._parent),
        )
        LOG.info("%s is finished: %d shards", where, len(self._tasks))
        return True

    def _outputs(self) -> _Outputs:
        """What the markers and ledgers tell.

        Raises: AbsentError if a marker is deleted meanwhile.
        """
        numbers = {task: number for number, task in enumerate(self._tasks)}
        shards: list[list[Shard | None]]
        shards = [[None] * len(self._tasks) for _ in range(self._config.variants)]
        outputs = _Outputs(shards)
        for task, record in finished_tasks(self._tokens, self._prefix, self._ledgers):
            if task in numbers:
                outputs.add(numbers[task], record)
        return outputs

    def _figures(self) -> dict[str, float]:
        """Of the train split: the constant that every validation of a prior reports.

        Raises: AbsentError if a marker is deleted meanwhile; CorruptError if an index is missing.
        """
        if self._facts["split"] != "train":
            return {}
        shards, indexes, count = [], [], 0
        for shard, index in fetched(self._first_variant, self._tasks):
            shards.append(shard)
            indexes.append(index)
            count += shard.blocks
            if count >= FIRST_BLOCKS:
                break
        part = Manifest(
            format=TOKENS, shards=shards, samples=0, facts={}, rejects={}, index_sha256=""
        )
        blocks = BlockReader(self._tokens, self._prefix, part, index=[joined(indexes)])
        sizes = codes_per_image(self._facts), int(self._facts["image_vocabulary"])
        read = lambda block: decode_block(blocks.read(block))  # noqa: E731
        return {ENTROPY: per_position_entropy(read, count, *sizes)}

    def _first_variant(self, task: str) -> tuple[Shard, dict[str, Any]]:
        """The entry and the index of a task's first shard."""
        record = read_json(self._tokens, f"{self._prefix}{DONE}{task}.json")
        shard = Shard(**record["shards"][0])
        try:
            return shard, read_shard_index(self._tokens, self._prefix, shard)
        except AbsentError as error:
            raise CorruptError(f"{error}; run `tapir tokenize` with --again") from error


def refuse_rejects(where: str, count: int, pairs: int, config: TokenizeConfig, first: str) -> None:
    """Raise InputError if a split has more rejects than max_rejects."""
    if count > config.max_rejects * pairs:
        raise InputError(
            f"{count} of {pairs} pairs of {where} are unusable, more than --max-rejects "
            f"{config.max_rejects}; the first: {first}. Pack with --min-side, or "
            "give a larger --max-rejects: what is made is kept"
        )
