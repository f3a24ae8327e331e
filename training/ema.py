"""Exponential moving average (EMA) of the weights, sharded as each rank saves them.

It is stored in host memory. On GPUs an update blocks the step for one copy on the device; the
transfer to the host and the averaging overlap the next steps (arXiv 2102.12092, section 3.5).
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from checkpoint.format import Reader, StateSlice
from parallel.config import OptimConfig
from parallel.engines.protocol import Engine

EMA = "ema"
"""Kind of the EMA slices in a checkpoint."""


class Average:
    """EMA of this rank's master weights; does nothing if optim.ema is 0."""

    def __init__(self, engine: Engine, optim: OptimConfig, device: torch.device) -> None:
        """`device` is this rank's device, which holds the engine's weights."""
        self._device = device
        self._engine, self._decay, self._every = engine, optim.ema, optim.ema_every
        self._mean: dict[tuple[str, int], Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "average")
        self._going_on: Future[None] | None = None
        if self._decay:
            self._mean = {
                key: part.data.detach().to("cpu", copy=True) for key, part in self._masters()
            }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the EMA with the weights after a step, every optim.ema_every steps."""
        if not self._decay or step % self._every:
            return
        self._settle()
        now = {key: part.data.detach() for key, part in self._masters()}
        if self._device.type != "cuda":
            self._lerp({key: data.to("cpu") for key, data in now.items()})
            return
        copies = {key: data.clone() for key, data in now.items()}
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        self._going_on = self._thread.submit(self._fetch, copies, done)

    def _fetch(self, copies: dict[tuple[str, int], Tensor], done: torch.cuda.Event) -> None:
        # a new thread's current device is 0, not the rank's
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            done.wait()
            self._lerp({key: data.to("cpu") for key, data in copies.items()})

    @torch.no_grad()
    def _lerp(self, now: dict[tuple[str, int], Tensor]) -> None:
        if now:
            means = [self._mean[key] for key in now]
            torch._foreach_lerp_(means, list(now.values()), 1 - self._decay)

    def _settle(self) -> None:
        if self._going_on is not None:
            self._going_on.result()
            self._going_on = None

    def slices(self) -> Iterator[StateSlice]:
        """The EMA slices that this rank saves."""
        self._settle()
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
        """Load the EMA from a checkpoint; without one, start from its weights."""
        self._settle()
        for key, part in self._masters() if self._decay else ():
            kind = EMA if EMA in reader.kinds(part.name) else "master"
            self._mean[key] = reader.flat(part.name, kind, part.start, part.stop)

    def _masters(self) -> Iterator[tuple[tuple[str, int], StateSlice]]:
        frozen = self._engine.frozen()  # the average of what never changes is itself
        for part in self._engine.state_slices():
            if part.kind == "master" and part.name not in frozen:
                yield (part.name, part.start), part
