"""The micro-batches of a run's steps, made ahead of the steps by threads."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from data_pipeline.streaming.ahead import depth_of, prepared_ahead
from data_pipeline.streaming.mixture import Batches
from data_pipeline.streaming.state import Position
from parallel.engines.protocol import Batch
from training.config import StageConfig
from training.run.versions import DataVersions
from training.tasks.task import Task, hand_over, pinned, split_records


@dataclass(frozen=True, kw_only=True)
class StepData:
    """What one step trains on."""

    micro: list[Batch]
    """Micro-batches on the device; empty ones where a stage needs no data."""
    records: Sequence[Any]
    state: Position
    """The position after these records."""


class Feed:
    """Makes the batches of a stream's records; its state is that of the steps, not of the threads.

    What was read and decoded ahead of a step is not consumed: a checkpoint has the position after
    the last step, and a resumed run makes the same batches again.
    """

    def __init__(
        self,
        task: Task[Any],
        stream: Batches,
        settings: StageConfig,
        device: torch.device,
        versions: DataVersions | None = None,
    ) -> None:
        """`versions` of the data set; None for one that cannot change."""
        self._task, self._stream, self._device = task, stream, device
        self._versions = versions
        self._micro = settings.engine.gradient_accumulation_steps
        self._workers = settings.loader.workers
        self.state: Position = stream.state
        """The position after the last step's records."""
        self._open: list[Generator[Any, None, None]] = []

    def resume(self, state: Position) -> None:
        """Continue after the batch of this state; collective over all ranks.

        Raises: ConfigError if the data or the order differ; InputError if the data set does not
        have the state's version any more.
        """
        self.close()
        self._stream.resume(state, self._versions.of(state) if self._versions else None)
        self.state = self._stream.state

    def steps(self, step: int) -> Iterator[StepData]:
        """The data of step `step` and of all after it, endlessly; `resume` or `close` ends it.

        The first step of an epoch is collective if the stream pauses.
        Raises: what reading and decoding raise, in the step that needs the data.
        """
        while True:
            for data in self._steps_without_pause(step):
                step += 1
                yield data
            self.close()
            self._stream.next_epoch(self._versions.newer(self.state) if self._versions else None)
            self.state = self._stream.state

    def _steps_without_pause(self, step: int) -> Iterator[StepData]:
        self.close()
        batches = iter(self._stream)
        made = prepared_ahead(
            zip(count(step), batches),
            lambda numbered: self._jobs(numbered[1][0], numbered[0]),
            self._workers,
            depth_of(self._workers, self._micro),
        )
        self._open = [made, batches]
        for (_, (records, state)), micro in made:
            self.state = state
            self._task.note_used(records)
            yield StepData(micro=self._on_device(micro), records=records, state=state)

    def close(self) -> None:
        """End the threads."""
        for generator in self._open:  # the reader of the stream before the stream
            generator.close()
        self._open = []

    def _jobs(self, records: Sequence[Any], step: int) -> list[Callable[[], Batch]]:
        return [partial(self._made, part, step) for part in split_records(records, self._micro)]

    def _made(self, part: Sequence[Any], step: int) -> Batch:
        return pinned(self._task.batch(part, step), self._device) if part else {}

    def _on_device(self, micro: list[Batch]) -> list[Batch]:
        return [hand_over(batch, self._device) for batch in micro]
