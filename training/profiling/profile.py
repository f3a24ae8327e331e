"""Always-on step-time profile of a run, by category and rank, without torch.profiler.

All time of a rank is assigned to categories (training/profiling/categories.py). The loop opens
intervals, the ledger opens one per collective, and torch's optimiser hooks open one per update; the
rest is `other`. Each step's seconds are written to a small file per rank, and the ranks exchange
them in the gather of each row of metrics.jsonl.
"""

import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from parallel.ledger import Ledger, untimed
from parallel.mesh import Mesh
from training.profiling.accounts import Accounts
from training.profiling.categories import CATEGORIES, OPTIMIZER, ProfileConfig
from training.profiling.clock import CudaClock, HostClock, Operation, Stretch, Timeline
from training.profiling.figures import (
    cores_of,
    measure_peak,
    memory,
    memory_of,
    slowest,
    speed_of,
    time_of,
)
from training.profiling.ring import Ring
from training.profiling.trace import Tracer

T = TypeVar("T", bound=Callable[..., Any])
_OFF = nullcontext()


def timed(category: str) -> Callable[[T], T]:
    """Decorator: assign a method's time to a category of `self.profile`."""

    def wrap(method: T) -> T:
        @functools.wraps(method)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            with self.profile.phase(category):
                return method(self, *arguments, **named)

        return call  # type: ignore[return-value]

    return wrap


class Profile:
    """Step-time profiler of one rank; inactive before `open`."""

    def __init__(
        self,
        config: ProfileConfig,
        mesh: Mesh,
        ledger: Ledger,
        out: Path,
        flops: float,
        precision: str,
    ) -> None:
        """`flops` per step over all ranks, 0 if unknown; `precision` of the engine."""
        self._config, self._flops, self._precision = config, flops, precision
        self._mesh, self._ledger, self._out = mesh, ledger, out
        self._accounts = Accounts(mesh.pipeline.size)
        clock = CudaClock if mesh.world.device.type == "cuda" else HostClock
        self._timeline = Timeline(clock(self._accounts.add))
        self._stretches = {name: Stretch(self._timeline, name) for name in CATEGORIES}
        self._tracer = Tracer(config, out, mesh.world.rank, self._timeline, mesh.world.device)
        self._hooks: list[Any] = []
        self._ring: Ring | None = None
        self._step = self._rows_step = 0
        self._peak = 0.0

    def open(self, step: int) -> None:
        """Start profiling after `step`, at the start of a run or after a rewind."""
        self._step, self._rows_step = 0, step
        if not self._config.always:
            return
        world = self._mesh.world
        self._close_ring()
        self._ring = Ring(self._out, world.rank, world.size, self._mesh.pipeline.rank, step)
        if not self._peak:
            self._peak = self._config.peak_tflops or self._measured_peak()
        self.attach()
        self._timeline.cut(self._accounts.forget)

    def attach(self) -> None:
        """Time phases, collectives and updates from now on."""
        if self._hooks:
            return
        self._ledger.timer = lambda *place: Stretch(self._timeline, Operation(*place))
        enter = self._stretches[OPTIMIZER].__enter__
        leave = self._stretches[OPTIMIZER].__exit__
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: enter()),
            register_optimizer_step_post_hook(lambda *_: leave()),
        ]

    def detach(self) -> None:
        """Stop timing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._ledger.timer = untimed

    def phase(self, category: str) -> AbstractContextManager[None]:
        """A context whose time belongs to a category."""
        return self._stretches[category] if self._hooks else _OFF

    def begin(self, step: int) -> None:
        """Begin a step; this ends the step before it, including its validation and save."""
        self._tracer.begin(step)
        if self._hooks:
            self._end_step()
        self._step = step

    def row(self, step: int, seconds: float, busy: float) -> dict[str, Any]:
        """Figures of all ranks for a row of metrics.jsonl; collective over all ranks.

        `seconds` is this step's time, `busy` the part of it without waits for other ranks.
        """
        spent, operations = self._accounts.take_row()
        steps, self._rows_step = max(step - self._rows_step, 1), step
        mine = {
            "stage": self._mesh.pipeline.rank,
            "busy": busy,
            "seconds": [round(value / steps, 6) for value in spent],
            "memory": memory(self._mesh.world.device),
            "peak": self._peak,
            **cores_of(self._mesh.world.device),
            "trace": self._tracer.asked(step),
        }
        ranks = [json.loads(text) for text in self._mesh.world.gather_text(json.dumps(mine))]
        self._tracer.plan(ranks[0]["trace"])
        row: dict[str, Any] = {**slowest(ranks), **memory_of(ranks)}
        if self._hooks:
            row |= speed_of(ranks, self._flops / seconds / 1e12) | time_of(ranks)
            row["comm_seconds"] = {
                group: {name: round(value / steps, 6) for name, value in part.items()}
                for group, part in operations.items()
            }
        return row

    def close(self) -> None:
        """Write the last step, and end a trace."""
        self._tracer.close()
        if self._hooks:
            self._end_step()
        self.detach()
        self._close_ring()

    def _measured_peak(self) -> float:
        return measure_peak(self._precision, self._mesh.world.device) / 1e12

    def _end_step(self) -> None:
        step, ring = self._step, self._ring

        def write() -> None:
            seconds = self._accounts.take_step()
            if ring is not None and step > 0:
                ring.add(step, seconds)

        self._timeline.cut(write)

    def _close_ring(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
