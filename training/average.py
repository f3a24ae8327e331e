"""An exponential moving average of the weights, kept in the shards that each rank saves."""

from collections.abc import Iterator

import torch
from torch import Tensor

from checkpoint.format import Reader, StateSlice
from parallel.config import OptimConfig
from parallel.engines.protocol import Engine

EMA = "ema"
"""Kind of its slices in a checkpoint."""


class Average:
    """The mean weights; nothing if optim.ema is 0."""

    def __init__(self, engine: Engine, optim: OptimConfig) -> None:
        self._engine, self._decay, self._every = engine, optim.ema, optim.ema_every
        self._mean: dict[tuple[str, int], Tensor] = {}
        if self._decay:
            self._mean = {key: part.data.detach().clone() for key, part in self._masters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights behind a step, every optim.ema_every steps."""
        if self._decay and step % self._every == 0:
            for key, part in self._masters():
                self._mean[key].lerp_(part.data, 1 - self._decay)

    def slices(self) -> Iterator[StateSlice]:
        """What this rank saves of the mean."""
        if self._decay:
            for key, part in self._masters():
                yield StateSlice(
                    name=part.name,
                    kind=EMA,
                    shape=part.shape,
                    start=part.start,
                    data=self._mean[key],
                )

    def load(self, reader: Reader) -> None:
        """Take the mean from a checkpoint; one without a mean gives its weights."""
        for key, part in self._masters() if self._decay else ():
            kind = EMA if EMA in reader.kinds(part.name) else "master"
            self._mean[key] = reader.flat(part.name, kind, part.start, part.stop)

    def _masters(self) -> Iterator[tuple[tuple[str, int], StateSlice]]:
        for part in self._engine.state_slices():
            if part.kind == "master":
                yield (part.name, part.start), part
