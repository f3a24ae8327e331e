"""Mean losses over held-out samples, the same on every mesh."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch

from core.heartbeat import Heart
from data_pipeline.streaming.ahead import depth_of, prepared_ahead
from data_pipeline.streaming.mixed_source import held_out_counts, parts_of
from data_pipeline.streaming.stream import first_records
from parallel.engines.protocol import Batch, Engine
from parallel.mesh import Mesh
from training.config import StageConfig
from training.tasks.task import Pictures, Task, hand_over, pinned

Change = Callable[[Batch, int], Batch]
"""(batch, index of its first record in this replica) -> changed batch."""
EVALUATED_TOGETHER = 64
"""Maximum samples per batch."""
TOKENS_TOGETHER = 8192
"""Maximum tokens per batch, to bound memory."""
KEPT = 2**28
"""Bytes of held-out tokens or encoded pictures that are kept; more are read at each validation."""


class Validation:
    """Validations of one run; collective over all ranks."""

    def __init__(
        self, task: Task[Any], engine: Engine, settings: StageConfig, mesh: Mesh, heart: Heart
    ) -> None:
        self._task, self._engine, self._settings = task, engine, settings
        self._mesh, self._heart, self._step = mesh, heart, 0
        self._unreadable = 0.0
        self._records: list[Sequence[Any]] = []
        """The held-out records of each data set, if those that the first validation read are at
        most KEPT bytes."""

    def run(self, step: int) -> tuple[dict[str, float], Pictures]:
        """(losses and the task's figures, pictures) of a validation.

        Of a mixture, `loss` is the mean over all records, and `loss/NAME` that of one data set.
        """
        self._step = step
        held_out = self._held_out()
        rank, size = self._mesh.data.rank, self._mesh.data.size
        rows = [self._means(records[rank::size]) for records in held_out]
        row = rows[0] if len(rows) == 1 else self._together(rows, list(map(len, held_out)))
        records = list(chain.from_iterable(held_out))
        figures, pictures = self._task.figures(
            self._means, records[rank::size], records, self._heart.beat
        )
        if self._unreadable:
            figures["pairs_unreadable"] = self._unreadable
        return {**row, **figures}, pictures

    def _together(self, rows: list[dict[str, float]], counts: list[int]) -> dict[str, float]:
        """The means over all records of a mixture, and those of each data set."""
        row = {
            name: sum(n * each[name] for n, each in zip(counts, rows, strict=True)) / sum(counts)
            for name in rows[0]
        }
        for part, each in zip(parts_of(self._task.held_out), rows, strict=True):
            row |= {f"{name}/{part.name}": value for name, value in each.items()}
        return row

    def _held_out(self) -> list[Sequence[Any]]:
        """The held-out records of each data set, multiples of order.lanes.

        There is at least one per lane: training.data_requirements checks it before the first step.
        A rank that needs no data reads none: its records are None.
        """
        if self._records:
            return self._records
        held_out, reads = self._task.held_out, self._mesh.needs_data
        asked, lanes = self._settings.loop.validation_samples, self._settings.order.lanes
        counts = held_out_counts(held_out, asked, lanes)
        records: list[Sequence[Any]] = [
            first_records(part.source, count) if reads else [None] * count
            for part, count in zip(parts_of(held_out), counts, strict=True)
        ]
        images = (getattr(each, "image", b"") for each in chain.from_iterable(records))
        if sum(memoryview(image).nbytes for image in images) <= KEPT:
            self._records = records
        return records

    def _means(self, records: Sequence[Any], change: Change | None = None) -> dict[str, float]:
        """Mean losses over the records of all replicas; collective over all ranks."""
        totals: dict[str, float] = {}
        together = max(1, min(EVALUATED_TOGETHER, TOKENS_TOGETHER // self._task.units))
        starts = iter(range(0, len(records), together))
        workers = self._settings.loader.workers

        def jobs(start: int) -> list[Callable[[], Batch]]:
            return [partial(self._made, records[start : start + together])]

        for start, (made,) in prepared_ahead(starts, jobs, workers, depth_of(workers)):
            self._heart.beat("validation")
            part = records[start : start + together]
            batch = hand_over(made, self._mesh.world.device)
            if self._mesh.needs_data:
                self._task.note_used(part)
                batch = change(batch, start) if change else batch
            losses = self._engine.evaluate(batch)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(part)
        return self._averages(totals, len(records))

    def _made(self, part: Sequence[Any]) -> Batch:
        if not self._mesh.needs_data:  # of the same size, and without content
            return {"records": torch.empty(len(part), 0, device="cpu")}
        batch = self._task.batch(part, self._step, training=False)
        return pinned(batch, self._mesh.world.device)

    def _averages(self, totals: dict[str, float], count: int) -> dict[str, float]:
        names = sorted(totals)
        means = [totals[name] / count for name in names]
        sums = torch.tensor([*means, self._task.unreadable], device=self._mesh.world.device)
        *averages, unreadable = self._mesh.world.mean(sums.double()).tolist()
        self._unreadable = round(unreadable * self._mesh.world.size)
        return dict(zip(names, averages, strict=True))
