"""The timeline of a rank: intervals with owners, measured on the host or on the GPU."""

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
"""A category, or a communication operation."""
Account = Callable[[Owner, float], None]
"""Called with (owner, seconds) of each finished interval."""


class Clock(Protocol):
    """Splits time into intervals, and reports their durations to an Account."""

    def mark(self, owner: Owner) -> None:
        """End the current interval, and assign it to `owner`."""

    def cut(self, then: Callable[[], None]) -> None:
        """Call `then` after all intervals up to now have been reported."""


class HostClock:
    """Wall-clock time of this process; reports at once."""

    def __init__(self, account: Account) -> None:
        self._account, self._since = account, time.perf_counter()

    def mark(self, owner: Owner) -> None:
        now = time.perf_counter()
        self._account(owner, now - self._since)
        self._since = now

    def cut(self, then: Callable[[], None]) -> None:
        then()


class CudaClock:
    """Time on the current CUDA stream, by events and without synchronisation.

    Host work counts only while the GPU is idle. Intervals before a `cut` are reported at the next
    one: a step's losses have been read by then, so its events have completed.
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
    """Nested intervals; time belongs to the innermost one, except in UNDIVIDED categories."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._owners: list[Owner] = [OTHER]
        self.ranges: list[Any] | None = None
        """Open profiler ranges while a trace is recorded, else None."""

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
        """End the current interval; call `then` after everything up to now has been reported."""
        self._clock.mark(self._owners[-1])
        self._clock.cut(then)


class Stretch:
    """A reusable context whose time belongs to an owner."""

    __slots__ = ("_owner", "_timeline")

    def __init__(self, timeline: Timeline, owner: Owner) -> None:
        self._timeline, self._owner = timeline, owner

    def __enter__(self) -> None:
        self._timeline.enter(self._owner)

    def __exit__(self, *_: object) -> None:
        self._timeline.leave()
