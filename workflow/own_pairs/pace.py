"""How fast a run trains, from its metrics while it does: will it end in time?"""

from collections.abc import Callable
from pathlib import Path

from training.run.metrics import row_of
from training.run.tail import Tail

_STEPS, _SECONDS = 20, 5.0
"""Of training, at least, that a speed is taken from."""
_WORTH = 0.2
"""Part of the time that a new start must leave for training."""


class Pace:
    """Follows one training command, which may go on from earlier rows of its run."""

    def __init__(
        self, run: Path, steps: int, seconds: float, restart: float, clock: Callable[[], float]
    ) -> None:
        """`seconds` from now all `steps` should be done; `restart`: seconds to start anew."""
        self._tail, self._clock = Tail(run / "metrics.jsonl"), clock
        self._steps, self._restart = steps, restart
        self._began = clock()
        self._until = self._began + seconds
        self.step = 0
        """The newest logged step."""
        self._look()
        self._before = self.step
        self._first: tuple[float, int] | None = None
        self.each: float | None = None
        """Seconds of a step, with validations and checkpoints; None while too few were logged."""

    @property
    def left(self) -> float:
        """Seconds until all steps should be done."""
        return self._until - self._clock()

    @property
    def start_up(self) -> float | None:
        """Seconds that this command needed until its first step; None while unknown."""
        if self._first is None or self.each is None:
            return None
        time, step = self._first
        return max(0.0, time - self._began - (step - self._before) * self.each)

    def is_late(self) -> bool:
        """True if it will not end in time, and fewer steps after a new start would."""
        before, now = self.step, self._clock()
        self._look()
        if self.step < self._before:  # rows after the checkpoint were cut off
            self._before = self.step
        if self.step in (before, self._before):
            return False  # between two rows nothing is known of the speed
        if self._first is None:
            self._first = now, self.step
        began, first = self._first
        if self.step - first < _STEPS or now - began < _SECONDS:
            return False
        self.each = (now - began) / (self.step - first)
        is_worth_it = self.left - self._restart > _WORTH * (self._until - self._began)
        return is_worth_it and now + (self._steps - self.step) * self.each > self._until

    def _look(self) -> None:
        for line in self._tail.lines():
            row = row_of(line)
            if row is not None and row.get("split") != "validation":
                self.step = row["step"]
