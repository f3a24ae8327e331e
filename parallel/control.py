"""What all ranks decide together, in the one reduction before each update.

Every rank adds its share of the squared norm, its losses and its stop request; all get the same
sums back, and so take the same decision: update, skip, or stop after this step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Judge = Callable[[float, float], str]
"""(gradient norm, loss) -> why the update must be skipped, or nothing."""
FIELDS = 3


def accept_all(_norm: float, _loss: float) -> str:
    """Skip nothing."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What one rank adds to the reduction, beside its gradients' squares."""

    losses: Sequence[Mapping[str, Tensor]] = ()
    """Losses of this step's micro-batches, on the ranks that compute them."""
    wants_stop: bool = False
    """This rank was asked to stop."""

    def share(self, device: torch.device) -> Tensor:
        """Sum of the losses, their count, and the stop request: (FIELDS,) float64."""
        known = [float(len(self.losses)), float(self.wants_stop)]
        counts = torch.tensor([0.0, *known], dtype=torch.float64, device=device)
        for row in self.losses:
            counts[0] += row["loss"].detach().to(device)
        return counts


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all ranks do about one update; the same on each of them."""

    norm: float
    """Global gradient norm before clipping; infinite if it is not finite."""
    loss: float
    """Mean loss of the global batch."""
    skipped: str = ""
    """Why this step's update is skipped."""
    stopping: bool = False
    """Some rank was asked to stop: all save after this step."""

    @property
    def clipped_by(self) -> float:
        """The norm to clip by; infinite to skip the update."""
        return math.inf if self.skipped else self.norm


def decide(norm: float, sums: Tensor, judge: Judge = accept_all) -> Decision:
    """The decision that follows from the sums of all ranks' votes."""
    loss, count, stop = sums.tolist()
    mean = loss / count if count else 0.0
    finite = math.isfinite(norm)
    skipped = judge(norm, mean) if finite else "a gradient is not finite"
    return Decision(norm=norm, loss=mean, skipped=skipped, stopping=stop > 0)
