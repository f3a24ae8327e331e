"""What all ranks decide together, in the one reduction before each update.

Every rank adds its share of the squared norm, its loss and its wish to stop; all get the same sums
back, and so take the same decision: update, skip, or stop after this step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Judge = Callable[[float, float], str]
"""(gradient norm, loss) -> why the update must be skipped, or nothing."""
FIELDS = 3


def accept_all(_norm: float, _loss: float) -> str:
    """Skip nothing."""
    return ""


@dataclass(kw_only=True)
class Control:
    """The decisions of the current step."""

    judge: Judge = accept_all
    wants_stop: bool = False
    """This rank was asked to stop."""
    seen: Sequence[Mapping[str, Tensor]] = field(default_factory=list)
    """Losses of this step's micro-batches, on the ranks that compute them."""
    stopping: bool = False
    """Some rank was asked to stop: all save after this step."""
    norm: float = 0.0
    """Global gradient norm before clipping; infinite if it is not finite."""
    loss: float = 0.0
    """Mean loss of the global batch."""
    skipped: str = ""
    """Why this step's update was skipped."""

    def share(self, device: torch.device) -> Tensor:
        """What this rank adds to the reduction: loss, count of losses, wish to stop; float64."""
        known = [float(len(self.seen)), float(self.wants_stop)]
        counts = torch.tensor([0.0, *known], dtype=torch.float64, device=device)
        for row in self.seen:
            counts[0] += row["loss"].detach().to(device)
        return counts

    def decide(self, norm: float, sums: Tensor) -> float:
        """Take the sums of all ranks; returns the norm to clip by, infinite to skip."""
        loss, count, stop = sums.tolist()
        self.norm, self.loss = norm, loss / count if count else 0.0
        self.stopping = stop > 0
        finite = math.isfinite(norm)
        self.skipped = self.judge(norm, self.loss) if finite else "a gradient is not finite"
        return math.inf if self.skipped else norm
