"""Counts this rank's communication: group, operation, calls and bytes.

The functions of torch.distributed are wrapped, so that traffic of megatron-core and DeepSpeed is
counted too. Bytes are those of the larger side of an operation (an all-gather's output, a
reduce-scatter's input) on this rank, before any algorithm splits them.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from core.heartbeat import Heart
from parallel.device import stopwatch
from parallel.mesh import Mesh

OPERATIONS = {
    "all_reduce": ("tensor", 0),
    "reduce": ("tensor", 0),
    "broadcast": ("tensor", 0),
    "all_gather": ("tensor_list", 0),
    "all_gather_into_tensor": ("output_tensor", 0),
    "reduce_scatter": ("input_list", 1),
    "reduce_scatter_tensor": ("input", 1),
    "all_to_all_single": ("input", 1),
    "send": ("tensor", 0),
    "recv": ("tensor", 0),
    "isend": ("tensor", 0),
    "irecv": ("tensor", 0),
}
"""Operation -> (name, position) of the argument whose bytes are counted."""
PAIRS = ("send", "recv", "isend", "irecv")
"""Point-to-point operations; without a group they are between pipeline stages."""
Counts = dict[str, dict[str, dict[str, int]]]
"""group -> operation -> {"calls", "bytes"}."""
Timer = Callable[[str, str, int], AbstractContextManager[None]]
"""(group, operation, bytes) -> a context around the rank's wait for an operation."""
_NOTHING = nullcontext()


def untimed(_group: str, _operation: str, _bytes: int) -> AbstractContextManager[None]:
    """No-op timer."""
    return _NOTHING


@dataclass(kw_only=True)
class Traffic:
    """Communication of this rank during a context."""

    counts: Counts = field(default_factory=dict)
    blocked: float = 0.0
    """Seconds that the rank was blocked in collectives."""

    @property
    def bytes(self) -> int:
        """Bytes of all operations."""
        return sum(row["bytes"] for group in self.counts.values() for row in group.values())


class Ledger:
    """Counts each operation of this rank; `counted` gives the counts of a context."""

    def __init__(self, mesh: Mesh, heart: Heart) -> None:
        self._aside, self._heart = mesh.world.aside, heart
        self._labels: dict[tuple[int, ...], str] = {}
        named = {
            "world": mesh.world.group,
            "machine": mesh.machine.handle,
            "between": mesh.between.handle,
            "data": mesh.data.handle,
            "tensor": mesh.tensor.handle,
            "ends": mesh.ends.handle,
            "pipeline": mesh.pipeline.handle,
        }
        for label, handle in named.items():
            if handle is not None:
                self._labels[tuple(dist.get_process_group_ranks(handle))] = label
        self._group_labels: dict[Any, str] = {}
        self._pairs = "pipeline" if mesh.pipeline.size > 1 else "world"
        self._counting: list[Counts] = []
        """Counts of all open contexts."""
        self._blocked = stopwatch(mesh.world.device)
        self._local = threading.local()
        self._last = ("", "", 0)
        """Group, operation and bytes of the last operation."""
        self._going_on: dict[int, tuple[str, str, int]] = {}
        """Handle id -> the same, for asynchronous operations that are not yet waited for."""
        self.timer: Timer = untimed
        """Set by a profiler to time the waits."""

    def skips(self, group: Any) -> bool:
        """True inside a counted operation (nested calls do not count), and for the saver."""
        return getattr(self._local, "inside", False) or (group is not None and group is self._aside)

    @contextmanager
    def note(self, group: Any, operation: str, count: int) -> Iterator[None]:
        """Count one operation of `count` bytes that runs in the context."""
        label = self._label(group, operation)
        for counts in self._counting:
            row = counts.setdefault(label, {}).setdefault(operation, {"calls": 0, "bytes": 0})
            row["calls"] += 1
            row["bytes"] += count
        self._heart.beat(f"{operation} over {label}")
        self._last = label, operation, count
        with self._waiting(self._last):
            yield

    @contextmanager
    def counted(self) -> Iterator[Traffic]:
        """Counts of the context; complete when it ends."""
        traffic, before = Traffic(), self._blocked.seconds()
        self._counting.append(traffic.counts)
        self._going_on.clear()
        try:
            yield traffic
        finally:
            self._counting.pop()
            self._going_on.clear()
            traffic.blocked = self._blocked.seconds() - before

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Count nothing that this thread does in the context."""
        before, self._local.inside = getattr(self._local, "inside", False), True
        try:
            yield
        finally:
            self._local.inside = before

    def follow(self, work: Any) -> None:
        """Remember the handle of the last operation if it is asynchronous."""
        if isinstance(work, dist.Work):
            self._going_on[id(work)] = self._last

    def wait(self, work: Any, run: Callable[[], Any]) -> Any:
        """Run the wait for an asynchronous operation."""
        place = None if self.skips(None) else self._going_on.pop(id(work), None)
        if place is None:
            return run()
        with self._waiting(place):
            return run()

    @contextmanager
    def _waiting(self, place: tuple[str, str, int]) -> Iterator[None]:
        self._local.inside = True
        try:
            with self.timer(*place), self._blocked:
                yield
        finally:
            self._local.inside = False

    def _label(self, group: Any, operation: str) -> str:
        label = self._group_labels.get(group)
        if group is None and operation in PAIRS:
            label = self._pairs
        elif label is None:
            ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            label = self._group_labels[group] = self._labels.get(ranks, "other")
        return label


@contextmanager
def recorded(mesh: Mesh, heart: Heart | None = None) -> Iterator[Ledger]:
    """Keep a ledger during the context; initialise DeepSpeed inside it."""
    ledger = Ledger(mesh, heart or Heart(mesh.world.rank))
    if mesh.world.group is None:
        yield ledger
        return
    before = {name: getattr(dist, name) for name in OPERATIONS}
    modules, wait = [dist, dist.distributed_c10d], dist.Work.wait

    def waits(work: Any, *arguments: Any, **named: Any) -> Any:
        return ledger.wait(work, lambda: wait(work, *arguments, **named))

    try:
        dist.Work.wait = waits  # type: ignore[method-assign, assignment]
        for name, function in before.items():
            noted = _noted(ledger, name, function)  # one: P2POp compares functions
            for module in modules:
                setattr(module, name, noted)
        yield ledger
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
        for name, function in before.items():
            for module in modules:
                setattr(module, name, function)


def _noted(ledger: Ledger, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    argument, place = OPERATIONS[name]

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        group = _group(named, arguments)
        if ledger.skips(group):
            with ledger.apart():
                return function(*arguments, **named)
        value = named[argument] if argument in named else arguments[place]
        with ledger.note(group, name, _bytes(value)):
            work = function(*arguments, **named)
        ledger.follow(work)
        return work

    return call


def _group(named: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
    if "group" in named:
        return named["group"]
    return next((a for a in arguments if isinstance(a, dist.ProcessGroup)), None)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value)
