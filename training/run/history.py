"""Maps steps of a run to the pairs it reads, and pairs to steps, from the data order alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.reader import CheckpointReader, finished_steps
from core.errors import InputError
from core.storage.store import open_store
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.raw import RawSource
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
        kind = TokenSource if config["stage"] == "prior" else RawSource
        self._source: Any = kind(self._store, _SPLIT)
        loop = self.settings.loop
        self._order = LaneOrder(
            self._source.sizes, loop.seed, loop.global_batch_size, self.settings.order
        )
        home = self.settings.checkpoint.to or str(run / "checkpoints")
        self._passed = sorted(_passed_over(home))
        self.steps: int = loop.steps

    def batch(self, step: int) -> list[ReadPair]:
        """The pairs of a training step, counted from 1 as in metrics.jsonl.

        Raises: InputError if the run has no such step.
        """
        if not 1 <= step <= self.steps:
            raise InputError(f"step {step} is not one of this run's 1 to {self.steps}")
        epoch, inside = self._position(step - 1)
        places = self._order.places(epoch, inside, range(self._order.lanes))
        blocks: dict[int, Any] = {}
        variant = epoch % self._source.variants
        rows = []
        for slot, (block, record) in enumerate(places.tolist()):
            if block not in blocks:
                blocks[block] = self._source.read(block, variant)
            pair = blocks[block][record]
            shard = self._source.blocks.shard_of(block, variant).shown
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

        Raises: InputError if the train split does not have it.
        """
        block, record = self._find(text)
        steps, before, epoch = [], 0, 0
        while before < self.steps:
            passed = [inside for e, inside in self._passed if e == epoch]
            place = self._order.locate(epoch, block, record)
            if place is not None and place[0] not in passed:
                step = before + place[0] - sum(inside < place[0] for inside in passed) + 1
                if step <= self.steps:
                    steps.append(step)
            before += self._order.steps(epoch) - len(passed)
            epoch += 1
        return steps

    def _find(self, text: str) -> tuple[int, int]:
        try:
            return find_pair(self._store, _SPLIT, self._source.blocks, text)
        except InputError:
            held_out = type(self._source)(self._store, "validation")
            find_pair(self._store, "validation", held_out.blocks, text)
            raise InputError(
                f"{text} is a pair of the validation split: no step reads it"
            ) from None

    def _position(self, index: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of the batch number `index`, without skipped batches."""
        epoch, before = 0, 0
        while True:
            steps = self._order.steps(epoch)
            passed = [inside for e, inside in self._passed if e == epoch]
            if index < before + steps - len(passed):
                inside = index - before
                for skipped in passed:
                    inside += skipped <= inside
                return epoch, inside
            before += steps - len(passed)
            epoch += 1


def _passed_over(checkpoints: str) -> list[tuple[int, int]]:
    """(epoch, step) of the batches that rewinds skipped, from the newest checkpoint."""
    store = open_store(checkpoints)
    steps = finished_steps(store)
    if not steps:
        return []
    stream = CheckpointReader(store, f"step-{steps[-1]}").facts["stream"]
    return [(int(epoch), int(step)) for epoch, step in stream.get("passed", ())]
