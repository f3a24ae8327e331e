"""Maps steps of a run to the pairs it reads, and pairs to steps, from the data order alone."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from checkpoint.reader import CheckpointReader, finished_steps
from core.errors import InputError
from core.storage.store import open_store
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.split import splits_at
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.streaming.order import LaneOrder
from training.run.config import config_of
from training.stages import STAGES, settings_from_json

_SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class ReadPair:
    """A pair in a batch."""

    slot: int
    """Row in the global batch."""
    id: int
    key: str
    """Empty for token data, which has ids only."""
    shard: str
    block: int
    record: int


@dataclass(frozen=True, kw_only=True)
class _Version:
    """A version of the data set, and its order."""

    source: Any
    order: LaneOrder


class History:
    """The data order of one run, with the batches that its rewinds skipped."""

    def __init__(self, run: Path) -> None:
        """Raises: InputError if it is not a run folder of dvae, prior or clip."""
        config = config_of(run)
        if config["stage"] not in STAGES:
            raise InputError(f"{run} is not a run of dvae, prior or clip")
        self.settings: Any = settings_from_json(
            config["stage"], {k: v for k, v in config.items() if k != "stage"}
        )
        self._store = open_store(self.settings.data)
        self._kind: Any = TokenSource if config["stage"] == "prior" else RawSource
        stream = _newest_stream(self.settings.checkpoint.to or str(run / "checkpoints"))
        self._passed = sorted((epoch, step) for epoch, step in stream.get("passed", ()))
        """(epoch, step) of the batches that rewinds skipped."""
        self._versions: list[tuple[int, str]]
        self._versions = stream.get("versions") or [(0, stream.get("fingerprint", ""))]
        """(first epoch, fingerprint) of the versions of the data; "" = the newest."""
        self.steps: int = self.settings.loop.steps

    def batch(self, step: int) -> list[ReadPair]:
        """The pairs of a training step, counted from 1 as in metrics.jsonl.

        Raises: InputError if the run has no such step.
        """
        if not 1 <= step <= self.steps:
            raise InputError(f"step {step} is not one of this run's 1 to {self.steps}")
        epoch, inside = self._position(step - 1)
        version = self._version(self._name_at(epoch))
        source, order = version.source, version.order
        places = order.places(epoch, inside, range(order.lanes))
        blocks: dict[int, Any] = {}
        variant = epoch % source.variants
        rows = []
        for slot, (block, record) in enumerate(places.tolist()):
            if block not in blocks:
                blocks[block] = source.read(block, variant)
            pair = blocks[block][record]
            shard = source.blocks.shard_of(block, variant).shown
            rows.append(
                ReadPair(
                    slot=slot,
                    id=pair.id,
                    key=getattr(pair, "key", ""),
                    shard=shard,
                    block=block,
                    record=record,
                )
            )
        return rows

    def seen(self, text: str) -> list[int]:
        """The training steps up to loop.steps that read a pair, given by its id or key.

        Raises: InputError if no version of the train split has it.
        """
        places = self._find(text)
        steps, before, epoch = [], 0, 0
        while before < self.steps:
            name = self._name_at(epoch)
            order, passed = self._version(name).order, self._passed_in(epoch)
            place = order.locate(epoch, *places[name]) if name in places else None
            if place is not None and place[0] not in passed:
                step = before + place[0] - sum(inside < place[0] for inside in passed) + 1
                if step <= self.steps:
                    steps.append(step)
            before += order.steps(epoch) - len(passed)
            epoch += 1
        return steps

    def _find(self, text: str) -> dict[str, tuple[int, int]]:
        """(block, record) of a pair in each version that has it."""
        places, missing = {}, None
        for _, name in self._versions:
            blocks = self._version(name).source.blocks
            try:
                places[name] = find_pair(self._store, _SPLIT, blocks, text)
            except InputError as error:
                missing = error
        if missing is not None and not places:
            held_out = self._kind(self._store, "validation")
            find_pair(self._store, "validation", held_out.blocks, text)
            raise InputError(
                f"{text} is a pair of the validation split: no step reads it"
            ) from missing
        return places

    def _position(self, index: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of the batch number `index`, without skipped batches."""
        epoch, before = 0, 0
        while True:
            steps = self._version(self._name_at(epoch)).order.steps(epoch)
            passed = self._passed_in(epoch)
            if index < before + steps - len(passed):
                inside = index - before
                for skipped in passed:
                    inside += skipped <= inside
                return epoch, inside
            before += steps - len(passed)
            epoch += 1

    def _name_at(self, epoch: int) -> str:
        return [name for first, name in self._versions if first <= epoch][-1]

    def _passed_in(self, epoch: int) -> list[int]:
        return [inside for e, inside in self._passed if e == epoch]

    @cache  # noqa: B019 - a history lives as long as its command
    def _version(self, fingerprint: str) -> _Version:
        kind, loop = self._kind, self.settings.loop
        opened = splits_at(self._store, kind.kind, fingerprint)[_SPLIT] if fingerprint else None
        source = kind(self._store, _SPLIT, opened=opened)
        batch, config = loop.global_batch_size, self.settings.order
        return _Version(source=source, order=LaneOrder(source.sizes, loop.seed, batch, config))


def _newest_stream(checkpoints: str) -> dict[str, Any]:
    """The data position of the newest checkpoint; empty if there is none."""
    store = open_store(checkpoints)
    steps = finished_steps(store)
    if not steps:
        return {}
    stream: dict[str, Any] = CheckpointReader(store, f"step-{steps[-1]}").facts["stream"]
    return stream
