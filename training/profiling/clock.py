"""The time line of a rank: who owns which stretch of it, measured on the host or on the GPU."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from training.profiling.categories import OTHER, UNDIVIDED


class Operation(NamedTuple):
    """A collective, or a message between two ranks."""

    group: str
    name: str
    bytes: int


Owner = str | Operation
"""A category, or what is waited in."""
Account = Callable[[Owner, float], None]
"""(owner, seconds): a stretch is over."""


class Clock(Protocol):
    """Knows when things happen; `measure` tells later how long they took."""

    def mark(self, owner: Owner) -> None:
        """The stretch up to now belongs to an owner."""

    def cut(self, then: Callable[[], None]) -> None:
        """Call `then` when all stretches up to now are accounted for."""


class HostClock:
    """Seconds of this process."""

    def __init__(self, account: Account) -> None:
        self._account, self._since = account, time.perf_counter()

    def mark(self, owner: Owner) -> None:
        now = time.perf_counter()
        self._account(owner, now - self._since)
        self._since = now

    def cut(self, then: Callable[[], None]) -> None:
        then()


class CudaClock:
    """Seconds of the current CUDA stream, by events and without any synchronisation.

    What the host does counts as far as the GPU is idle meanwhile. A step's events are read when
    the next step is over: by then the step's losses have been read, and so they lie behind.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._free: list[torch.cuda.Event] = []
        self._last = self._event()
        self._marks: deque[tuple[Owner, torch.cuda.Event]] = deque()
        self._steps: deque[tuple[int, Callable[[], None]]] = deque()

    def mark(self, owner: Owner) -> None:
        self._marks.append((owner, self._event()))

    def cut(self, then: Callable[[], None]) -> None:
        before = sum(count for count, _ in self._steps)
        self._steps.append((len(self._marks) - before, then))
        while len(self._steps) > 1:
            count, done = self._steps.popleft()
            for _ in range(count):
                owner, event = self._marks.popleft()
                self._account(owner, self._last.elapsed_time(event) / 1000)
                self._free.append(self._last)
                self._last = event
            done()

    def _event(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Timeline:
    """Stretches within stretches; each moment belongs to the innermost one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._owners: list[Owner] = [OTHER]
        self.ranges: list[Any] | None = None
        """Open ranges of a trace that is being recorded."""

    def enter(self, owner: Owner) -> None:
        outer = self._owners[-1]
        self._clock.mark(outer)
        self._owners.append(outer if outer in UNDIVIDED else owner)
        if self.ranges is not None:
            name = owner if isinstance(owner, str) else f"{owner.name} over {owner.group}"
            opened = torch.autograd.profiler.record_function(f"tapir: {name}")
            self.ranges.append(opened.__enter__())

    def leave(self) -> None:
        self._clock.mark(self._owners.pop())
        if self.ranges:
            self.ranges.pop().__exit__(None, None, None)

    def cut(self, then: Callable[[], None]) -> None:
        """End the current stretch; `then` is called when everything up to now is known."""
        self._clock.mark(self._owners[-1])
        self._clock.cut(then)


class Stretch:
    """A context that owns the time spent in it."""

    __slots__ = ("_owner", "_timeline")

    def __init__(self, timeline: Timeline, owner: Owner) -> None:
        self._timeline, self._owner = timeline, owner

    def __enter__(self) -> None:
        self._timeline.enter(self._owner)

    def __exit__(self, *_: object) -> None:
        self._timeline.leave()
