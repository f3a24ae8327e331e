"""Learning rate, temperature and beta as plain functions of the step."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from parallel.config import OptimConfig


def cosine(first: float, last: float, share: float) -> float:
    """Half-cosine from first to last; `share` is clamped to [0, 1]."""
    share = min(max(share, 0.0), 1.0)
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def learning_rate(optim: OptimConfig, step: int, steps: int, halved: int = 0) -> float:
    """The learning rate of an update.

    Linear warm-up, then optim.lr halved `halved` times if optim.halvings is set; else a cosine to
    final_lr, which is reached at optim.decay_fraction of the run.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.halvings:
        return optim.lr * 0.5**halved
    span = max(optim.decay_fraction * steps - optim.warmup, 1)
    return cosine(optim.lr, optim.final_lr, (step - optim.warmup) / span)


@dataclass
class Plateau:
    """Detects plateaus of the validation loss.

    The paper halves the learning rate five times "each time the training loss appeared to
    plateau" and gives no rule; this one uses the validation loss.
    Source: arXiv 2102.12092, section 3.5.
    """

    best: float = math.inf
    since: int = 0
    """Validations since the best one."""
    halved: int = 0

    def observe(self, optim: OptimConfig, step: int, loss: float) -> bool:
        """Add the validation loss after a step; returns True if the rate is halved now."""
        if step < optim.warmup or self.halved >= optim.halvings:
            return False
        if loss < self.best * (1 - optim.plateau_threshold):
            self.best, self.since = loss, 0
            return False
        self.since += 1
        if self.since < optim.patience:
            return False
        self.since, self.halved = 0, self.halved + 1
        return True

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint; the best loss is text, because it may be infinite."""
        return {**asdict(self), "best": repr(self.best)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a saved state; an empty state, of a run without plateaus, resets."""
        self.best = float(state.get("best", math.inf))
        self.since, self.halved = int(state.get("since", 0)), int(state.get("halved", 0))
