"""Maps steps of a run to the pairs it reads, and pairs to steps, from the data order alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.reader import CheckpointReader, finished_steps
from core.errors import InputError
from core.storage.mixture import data_sets
from core.storage.store import open_store
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.streaming.mixed_source import open_source, parts_of
from data_pipeline.streaming.reads import reads_of
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
    data: str = ""
    """The data set of a mixture."""


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
        self._kind: Any = TokenSource if config["stage"] == "prior" else RawSource
        source = open_source(self._kind, self.settings.data, _SPLIT)
        self._parts = parts_of(source)
        loop = self.settings.loop
        self._reads = reads_of(source, loop.seed, loop.global_batch_size, self.settings.order)
        home = self.settings.checkpoint.to or str(run / "checkpoints")
        passed = _passed_over(home)
        self._passed = sorted(self._reads.number(epoch, step) for epoch, step in passed)
        """Numbers of the skipped batches."""
        self.steps: int = loop.steps

    def batch(self, step: int) -> list[ReadPair]:
        """The pairs of a training step, counted from 1 as in metrics.jsonl.

        Raises: InputError if the run has no such step.
        """
        if not 1 <= step <= self.steps:
            raise InputError(f"step {step} is not one of this run's 1 to {self.steps}")
        number = step - 1
        for skipped in self._passed:
            number += skipped <= number
        blocks: dict[tuple[int, int, int], Any] = {}
        rows = []
        for slot, (which, epoch, block, record) in enumerate(self._reads.slots(number)):
            part = self._parts[which]
            variant = epoch % part.source.variants
            read = which, block, variant
            if read not in blocks:
                blocks[read] = part.source.read(block, variant)
            pair = blocks[read][record]
            rows.append(
                ReadPair(
                    slot=slot,
                    id=pair.id,
                    key=getattr(pair, "key", ""),
                    shard=part.source.blocks.shard_of(block, variant).shown,
                    block=block,
                    record=record,
                    data=part.place,
                )
            )
        return rows

    def seen(self, text: str) -> list[int]:
        """The training steps up to loop.steps that read a pair, given by its id or key.

        Raises: InputError if the train split does not have it.
        """
        end, steps = self.steps + len(self._passed), []
        for which, block, record in self._find(text):
            numbers = self._reads.batches(which, block, record, end)
            steps += [
                number - sum(skipped < number for skipped in self._passed) + 1
                for number in numbers
                if number not in self._passed
            ]
        return sorted(step for step in steps if step <= self.steps)

    def _find(self, text: str) -> list[tuple[int, int, int]]:
        """(data set, block, record) of a pair; several sets of a mixture may have it."""
        places, errors = [], []
        for which, part in enumerate(self._parts):
            store = open_store(data_sets(self.settings.data)[which].place)
            try:
                places.append((which, *find_pair(store, _SPLIT, part.source.blocks, text)))
            except InputError as error:
                errors.append((store, error))
        if not places:
            self._refuse_unknown(text, errors)
        return places

    def _refuse_unknown(self, text: str, errors: list[tuple[Any, InputError]]) -> None:
        """Raises: InputError, which tells whether it is a held-out pair."""
        for store, error in errors:
            held_out = self._kind(store, "validation")
            try:
                find_pair(store, "validation", held_out.blocks, text)
            except InputError:
                continue
            raise InputError(
                f"{text} is a pair of the validation split: no step reads it"
            ) from error
        raise errors[0][1]


def _passed_over(checkpoints: str) -> list[tuple[int, int]]:
    """(epoch, step) of the batches that rewinds skipped, from the newest checkpoint."""
    store = open_store(checkpoints)
    steps = finished_steps(store)
    if not steps:
        return []
    stream = CheckpointReader(store, f"step-{steps[-1]}").facts["stream"]
    return [(int(epoch), int(step)) for epoch, step in stream.get("passed", ())]
