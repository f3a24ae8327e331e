"""The real loop of a stage, without data and without a disk.

A rank makes steps, validates, saves, makes one more step and finishes, as a run does in days. Data
sets have the required number of samples without content; checkpoints have a manifest without
weights.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint.saver
import checkpoint.writer
import data_pipeline.streaming.ahead
import training.ema
import training.export.save
import training.run.versions
import training.trainer
from core.config import check
from core.errors import AbsentError
from core.heartbeat import Heart
from core.storage.mixture import data_sets
from data_pipeline.streaming.mixed_source import MixedSource, Part
from data_pipeline.streaming.state import StreamState
from parallel.engines.protocol import Batch, Engine, Losses, StepResult
from parallel.engines.registry import build_engine
from parallel.ledger import Ledger
from parallel.mesh import Mesh
from planning.rehearsal.patches import AtOnce, Change, no_progress, nothing, replaced
from planning.rehearsal.recorder import Recorder
from training.data_requirements import DataSizes, size_problems
from training.export.files import WEIGHTS, WeightsFile
from training.export.save import Writers
from training.profiling.categories import ProfileConfig
from training.tasks.clip import ClipTask
from training.tasks.dvae import DVAETask
from training.tasks.dvae_program import ExtraLosses
from training.tasks.prior import PriorTask
from training.tasks.splits import UNREAD, Splits
from training.tasks.task import Pictures
from training.trainer import Run

_NOWHERE = Path(os.devnull) / "rehearsal"
"""A folder that cannot exist: nothing is read or written there."""
_TWICE = 2
"""Evaluations of each batch size run after a step; later ones repeat the calls of the last."""


def play(stage: str, settings: Any, steps: int, mesh: Mesh, recorder: Recorder | None) -> None:
    """Train `steps` steps, validate, save, train one more step and finish.

    With a recorder, repeated evaluations are not run: their calls are recorded again.
    """
    settings = _shortened(settings, steps)
    check(size_problems(settings, _sizes(settings)))
    heart = Heart(mesh.world.rank)
    with replaced(_changes(recorder)):
        task = _TASKS[stage](settings, mesh)
        run = Run(stage, task, settings, mesh, Ledger(mesh, heart), heart)
        run.train()
        run.close()


def _shortened(settings: Any, steps: int) -> Any:
    """Settings of a run of `steps` steps and one more that writes no files."""
    engine = settings.engine
    if engine.precision == "auto":  # communication does not depend on it
        engine = replace(engine, precision="bf16")
    return replace(
        settings,
        engine=engine,
        out=_NOWHERE,
        init="",  # no weights are read; the collectives of loading them are not rehearsed
        resume_with="",
        loop=replace(settings.loop, steps=steps + 1, validate_every=steps),
        checkpoint=replace(settings.checkpoint, every=steps, to=""),
        profile=ProfileConfig(always=False),
    )


def _sizes(settings: Any) -> DataSizes:
    """Sizes of a data set with the required number of held-out pairs, and enough others."""
    held_out, lanes = settings.loop.validation_samples, settings.order.lanes
    place = f"a data set for loop.validation_samples={held_out}"
    return DataSizes(
        place=place, train=settings.loop.global_batch_size, blocks=lanes, held_out=held_out
    )


def _changes(recorder: Recorder | None) -> list[Change]:
    def engine_of(*arguments: Any) -> Engine:
        engine: Engine = build_engine(*arguments)
        if recorder is not None:
            _repeat_evaluations(engine, recorder)
        return engine

    return [
        (training.trainer, "build_engine", engine_of),
        (training.trainer, "open_stream", EmptyStream),
        (training.run.versions, "open_newer", _nothing_newer),
        (training.trainer, "RunFolder", _NoFolder),
        (training.trainer, "open_store", lambda _: _MemoryStore()),
        (training.export.save, "CheckpointReader", _NoCheckpoint),
        (training.export.save.Writers, "together", _together),
        (training.export.save, "_begin", lambda *_: {WEIGHTS: []}),
        (training.export.save, "_write", lambda *_: WeightsFile(file=WEIGHTS, bytes=0, sha256="")),
        (training.export.save, "_is_absent", lambda *_: False),
        (training.export.save, "write_description", nothing),
        (training.trainer, "progress", no_progress),
        (training.ema, "ThreadPoolExecutor", AtOnce),
        (data_pipeline.streaming.ahead, "ThreadPoolExecutor", AtOnce),
        (checkpoint.saver, "ThreadPoolExecutor", AtOnce),
        (checkpoint.writer, "_write_slices", lambda *_: {}),
    ]


def _repeat_evaluations(engine: Any, recorder: Recorder) -> None:
    """Patch the engine to run two evaluations per batch size and step, and to repeat the rest."""
    evaluate: Callable[[Batch], Losses]
    step, evaluate = engine.step, engine.evaluate
    known: dict[Any, list[tuple[Losses, int, int]]] = defaultdict(list)

    def stepped(micro_batches: Sequence[Batch], lr: float, wants_stop: bool = False) -> StepResult:
        known.clear()
        result: StepResult = step(micro_batches, lr, wants_stop)
        return result

    def evaluated(batch: Batch) -> Losses:
        rows = known[tuple((name, tuple(batch[name].shape)) for name in sorted(batch))]
        if len(rows) == _TWICE:
            losses, first, last = rows[-1]
            recorder.repeat(first, last)
            return losses
        first = len(recorder.sequence.operations)
        losses = evaluate(batch)
        rows.append((losses, first, len(recorder.sequence.operations)))
        return losses

    engine.step, engine.evaluate = stepped, evaluated


class _Samples:
    """A data set of samples without content."""

    fingerprint, kind, variants = "", "", 1

    def __init__(self, count: int) -> None:
        self.sizes = np.array([count])

    def read(self, block: int, _: int = 0) -> list[Any]:
        return [object() for _ in range(self.sizes[block])]


def _held_out(settings: Any) -> Any:
    """Enough held-out samples, of each data set of a mixture."""
    samples, sets = _Samples(settings.loop.validation_samples), data_sets(settings.data)
    if len(sets) == 1:
        return samples
    return MixedSource(
        [Part(name=s.place, place=s.place, share=s.share, source=samples) for s in sets]
    )


class PriorWithoutData(PriorTask):
    """A prior's task on samples without content."""

    def __init__(self, settings: Any, mesh: Mesh) -> None:
        self._settings = settings
        self.held_out = _held_out(settings)
        self.train: Any = _Samples(0)
        self._set_model(settings.model, settings.loop.seed, mesh.shared)

    def batch(self, records: Sequence[Any], step: int, training: bool = True) -> Batch:
        count, model = len(records), self.model_config
        text = torch.zeros(count, model.text_length, dtype=torch.int64, device="cpu")
        image = torch.zeros(count, model.image_length, dtype=torch.int64, device="cpu")
        return {"text": text, "image": image}

    def facts(self) -> dict[str, Any]:
        return {}

    def _entropy(self) -> float:
        return 0.0


class _DVAEWithoutData(DVAETask):
    unreadable, note_used = 0, nothing

    def __init__(self, settings: Any, mesh: Mesh) -> None:
        self.held_out = _held_out(settings)
        self.train: Any = _Samples(0)
        self._set_model(settings.model, settings.loop.seed, ExtraLosses.of(settings))
        self._world, self._reports_fid = mesh.world, settings.rfid is not None

    def batch(self, records: Sequence[Any], step: int, training: bool = True) -> Batch:
        return {
            "pixels": _pixels(len(records), self.model_config.pixels),
            "keys": torch.zeros(len(records), dtype=torch.int64, device="cpu"),
            "tau": torch.tensor(1.0, device="cpu"),
            "beta": torch.tensor(1.0, device="cpu"),
            "adversarial": torch.tensor(1.0, device="cpu"),
        }

    def figures(self, *_: Any) -> tuple[dict[str, float], Pictures]:
        if self._reports_fid:
            self._world.of_rank_0(0.0)
        return {}, {}  # the others are computed from values, without communication


class _ClipWithoutData(ClipTask):
    unreadable, note_used = 0, nothing

    def __init__(self, settings: Any, mesh: Mesh) -> None:
        self.held_out = _held_out(settings)
        self.train: Any = _Samples(0)
        self._set_model(settings.model, settings.loop.seed, mesh.world)

    def batch(self, records: Sequence[Any], step: int, training: bool = True) -> Batch:
        count, model = len(records), self.model_config
        text = torch.zeros(count, model.text_length, dtype=torch.int64, device="cpu")
        return {"pixels": _pixels(count, model.pixels), "text": text}

    def facts(self) -> dict[str, Any]:
        return {}


_TASKS: dict[str, Callable[[Any, Mesh], Any]] = {
    "prior": PriorWithoutData,
    "dvae": _DVAEWithoutData,
    "clip": _ClipWithoutData,
}


def _pixels(count: int, side: int) -> torch.Tensor:
    return torch.zeros(count, 3, side, side, device="cpu")


class EmptyStream:
    """Batches without content, by the rules of `data_pipeline.streaming.stream.Stream`.

    If it pauses, each epoch has one step, so that ranks ask for a newer version before each.
    """

    def __init__(
        self,
        source: Any,
        *,
        seed: int,
        batch: int,
        order: Any,
        loader: Any,
        rank: int,
        ranks: int,
        reads: bool,
        pauses: bool,
    ) -> None:
        self._records, self._pauses = [None] * (batch // ranks if reads else 0), pauses
        self.state = StreamState(
            fingerprint=source.fingerprint,
            seed=seed,
            batch=batch,
            lanes=order.lanes,
            window=order.shuffle_buffer,
            version=0,
            epoch=0,
            step=0,
        )

    def resume(self, state: StreamState, _: Any = None) -> None:
        """Continue after the batch of this state."""
        self.state = state

    def __iter__(self) -> Iterator[tuple[list[None], StreamState]]:
        while True:
            self.state = replace(self.state, step=self.state.step + 1)
            yield self._records, self.state
            if self._pauses:
                return

    def next_epoch(self, _: Any) -> None:
        self.state = replace(self.state, epoch=self.state.epoch + 1, step=0)


def _nothing_newer(_: str, __: str, mesh: Mesh, ___: str) -> Splits:
    """The collective of `open_newer` when the data set has not grown."""
    mesh.world.of_rank_0(0.0)
    return UNREAD


def _together(writers: Writers, work: Callable[[], Any]) -> list[Any]:
    """A rehearsed rank hears only itself: what rank 0 says is one file."""
    result = work()
    writers.gather("")
    writers.gather("")
    return [{WEIGHTS: []} if result is None else result]


class _NoCheckpoint:
    def __init__(self, *_: Any) -> None: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}


class _MemoryStore:
    """A store in this process' memory; it holds the manifests."""

    url = "memory"

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if name not in self._held:
            raise AbsentError(f"there is no {name} in a rehearsal")
        return self._held[name][start : None if length is None else start + length]

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        self._held[name] = data
        return True

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self._held if name.startswith(prefix))

    def exists(self, name: str) -> bool:
        return name in self._held

    def delete(self, name: str) -> None:
        self._held.pop(name, None)


class _NoFolder:
    """A run folder that writes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.begin = self.log = self.show = self.note_history = self.close = nothing
