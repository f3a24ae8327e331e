"""Guards of the update: spikes of loss and gradient norm, and a history that resumes exactly."""

import math
from collections import deque
from typing import Any

from training.recovery.config import GuardConfig

_LEAST = 0.01
"""Smallest standard deviation, relative to the mean: a flat curve is not a spike's excuse."""


class Guard:
    """Judges each update by those before; the same on every rank, since its inputs are."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)

    def judge(self, norm: float, loss: float) -> str:
        """Say why an update is a spike, or take it into the history and return nothing.

        Units: nats; the norm is compared by its logarithm, for its tail is long.
        """
        size = math.log(max(norm, 1e-30))
        if not math.isfinite(loss):
            return "the loss is not finite"
        for name, value, history, floor in (
            ("loss", loss, self._losses, None),
            ("log of the gradient norm", size, self._norms, 0.1),
        ):
            reason = self._spike(name, value, history, floor)
            if reason:
                return reason
        self._losses.append(loss)
        self._norms.append(size)
        return ""

    def state(self) -> dict[str, Any]:
        """The history, for a checkpoint."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def load(self, state: dict[str, Any]) -> None:
        """Take back a history."""
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(state.get("losses", []))
        self._norms.extend(state.get("norms", []))

    def _spike(self, name: str, value: float, history: deque[float], floor: float | None) -> str:
        sigmas = self._config.sigma_factor
        if not sigmas or len(history) < self._config.window // 2:
            return ""
        mean = sum(history) / len(history)
        variance = sum((x - mean) ** 2 for x in history) / len(history)
        least = max(_LEAST * abs(mean), 1e-6) if floor is None else floor
        deviation = max(math.sqrt(variance), least)
        if value <= mean + sigmas * deviation:
            return ""
        return (
            f"{name} {value:.4g} lies {(value - mean) / deviation:.1f} standard deviations above "
            f"the mean {mean:.4g} of the last {len(history)} updates"
        )
