"""Maps steps of a run to the pairs it reads, and pairs to steps, from the data order alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.reader import CheckpointReader, finished_steps
from core.errors import InputError
from core.storage.mixture import data_sets
from core.storage.store import open_store
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.streaming.mixture import set_seed
from data_pipeline.streaming.reads import Mixture, OneSet, PlaceAt, Reads
from data_pipeline.streaming.shares import Shares
from training.run.config import config_of
from training.run.read_sets import ReadSet, Versions
from training.stages import STAGES, settings_from_json


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
        stream = _newest_stream(self.settings.checkpoint.to or str(run / "checkpoints"))
        kind = TokenSource if config["stage"] == "prior" else RawSource
        self._sets = self._read_sets(kind, stream)
        self._reads = self._order()
        self.passed = [(epoch, step) for epoch, step in stream.get("passed", ())]
        """(epoch, step) of the batches that rewinds skipped."""
        self.steps: int = self.settings.loop.steps

    def batch(self, step: int) -> list[ReadPair]:
        """The pairs of a training step, counted from 1 as in metrics.jsonl.

        Raises: InputError if the run has no such step.
        """
        if not 1 <= step <= self.steps:
            raise InputError(f"step {step} is not one of this run's 1 to {self.steps}")
        number = step - 1
        for skipped in self._skipped():
            number += skipped <= number
        blocks: dict[tuple[int, int, int], Any] = {}
        rows = []
        for slot, (which, epoch, block, record) in enumerate(self._reads.slots(number)):
            source = self._sets[which].source_at(epoch)
            variant = epoch % source.variants
            if (which, epoch, block) not in blocks:
                blocks[which, epoch, block] = source.read(block, variant)
            pair = blocks[which, epoch, block][record]
            rows.append(
                ReadPair(
                    slot=slot,
                    id=pair.id,
                    key=getattr(pair, "key", ""),
                    shard=source.blocks.shard_of(block, variant).shown,
                    block=block,
                    record=record,
                    data=self._sets[which].place if len(self._sets) > 1 else "",
                )
            )
        return rows

    def seen(self, text: str) -> list[int]:
        """The training steps up to loop.steps that read a pair, given by its id or key.

        Raises: InputError if no version of a train split has it.
        """
        skipped, steps = self._skipped(), []
        for which, place_at in self._find(text):
            for number in self._reads.batches(which, place_at, self.steps + len(skipped)):
                step = number - sum(other < number for other in skipped) + 1
                if number not in skipped and step <= self.steps:
                    steps.append(step)
        return sorted(steps)

    def _skipped(self) -> list[int]:
        """Numbers of the skipped batches."""
        return sorted(self._reads.number(epoch, step) for epoch, step in self.passed)

    def _find(self, text: str) -> list[tuple[int, PlaceAt]]:
        """The places of a pair in each data set that has it: several of a mixture may."""
        places, missing = [], None
        for which, each in enumerate(self._sets):
            try:
                places.append((which, each.find(text)))
            except InputError as error:
                missing = error
        if missing is None or places:
            return places
        if any(each.holds_out(text) for each in self._sets):
            message = f"{text} is a pair of the validation split: no step reads it"
            raise InputError(message) from missing
        raise missing

    def _read_sets(self, kind: Any, stream: dict[str, Any]) -> list[ReadSet]:
        sets, loop, order = data_sets(self.settings.data), self.settings.loop, self.settings.order
        positions = stream.get("sets", [stream]) if stream else [{}] * len(sets)
        if len(sets) == 1:
            versions = _versions(positions[0])
            batch = loop.global_batch_size
            return [ReadSet(kind, sets[0].place, versions, loop.seed, batch, order)]
        return [
            ReadSet(
                kind, each.place, _versions(position), set_seed(loop.seed, i), order.lanes, order
            )
            for i, (each, position) in enumerate(zip(sets, positions, strict=True))
        ]

    def _order(self) -> Reads:
        loop, lanes = self.settings.loop, self.settings.order.lanes
        if len(self._sets) == 1:
            return OneSet(self._sets[0].order_at)
        parts = [each.share for each in data_sets(self.settings.data)]
        shares = Shares(parts, loop.seed, loop.global_batch_size, lanes)
        return Mixture(shares, [each.order_at for each in self._sets])


def _versions(position: dict[str, Any]) -> Versions:
    return position.get("versions") or [(0, position.get("fingerprint", ""))]


def _newest_stream(checkpoints: str) -> dict[str, Any]:
    """The data position of the newest checkpoint; empty if there is none."""
    store = open_store(checkpoints)
    steps = finished_steps(store)
    if not steps:
        return {}
    stream: dict[str, Any] = CheckpointReader(store, f"step-{steps[-1]}").facts["stream"]
    return stream
