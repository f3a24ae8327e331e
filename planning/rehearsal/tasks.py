"""The stages' tasks for rehearsals: models of full size, and batches without content."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from core.storage.mixture import data_sets
from data_pipeline.streaming.mixed_source import MixedSource, Part
from parallel.engines.protocol import Batch
from parallel.mesh import Mesh
from planning.rehearsal.patches import nothing
from training.tasks.clip import ClipTask
from training.tasks.dvae import DVAETask
from training.tasks.prior import PriorTask
from training.tasks.task import Pictures


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


class _PriorWithoutData(PriorTask):
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
        self._set_model(settings.model, settings.loop.seed)

    def batch(self, records: Sequence[Any], step: int, training: bool = True) -> Batch:
        return {
            "pixels": _pixels(len(records), self.model_config.pixels),
            "keys": torch.zeros(len(records), dtype=torch.int64, device="cpu"),
            "tau": torch.tensor(1.0, device="cpu"),
            "beta": torch.tensor(1.0, device="cpu"),
        }

    def figures(self, *_: Any) -> tuple[dict[str, float], Pictures]:
        return {}, {}  # computed from values, without communication


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


TASKS: dict[str, Callable[[Any, Mesh], Any]] = {
    "prior": _PriorWithoutData,
    "dvae": _DVAEWithoutData,
    "clip": _ClipWithoutData,
}


def _pixels(count: int, side: int) -> torch.Tensor:
    return torch.zeros(count, 3, side, side, device="cpu")
