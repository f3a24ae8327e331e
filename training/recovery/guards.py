"""Detects spikes of loss and gradient norm; the history is saved in checkpoints."""

import math
from collections import deque
from typing import Any

from training.recovery.config import GuardConfig

_LEAST = 0.01
"""Minimum standard deviation relative to the mean, so that a flat loss curve triggers nothing."""


class Guard:
    """Compares each update with earlier ones; equal on all ranks, since its inputs are."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)

    def judge(self, norm: float, loss: float) -> str:
        """Return why an update is a spike; else add it to the history and return "".

        Units: loss in nats; the norm is compared by its logarithm, because it is heavy-tailed.
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
        """The history, to save in a checkpoint."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a saved history."""
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
            f"{name} {value:.4g} is {(value - mean) / deviation:.1f} standard deviations above "
            f"the mean {mean:.4g} of the last {len(history)} updates"
        )
