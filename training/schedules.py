"""Learning rate, temperature and beta as plain functions of the step."""

import math

from parallel.config import OptimConfig


def cosine(first: float, last: float, share: float) -> float:
    """Go from first to last along half a cosine; outside of [0, 1] the ends are held."""
    share = min(max(share, 0.0), 1.0)
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to final_lr at the last step."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    span = max(steps - optim.warmup, 1)
    return cosine(optim.lr, optim.final_lr, (step - optim.warmup) / span)
