"""Gradient scales of residual branches: 16-bit training without one global loss scale.

The gradient that enters a branch is multiplied by the branch's own scale and cast to 16 bits; the
gradient that leaves it is filtered (non-finite values become zero), divided by the scale and
added in fp32 to the identity path's. Parameter gradients stay scaled in 16 bits and are unscaled
in fp32. Source: arXiv 2102.12092, appendix D.

Losses are means over a replica's batch here, while the paper divides by the global batch and
multiplies its scales by the number of GPUs M: the two cancel, so that M is 1 in all constants.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

FIRST, LEAST, MOST = 2.0**13, 2.0**7, 2.0**24
GROWTH, SHRINK = 2.0 ** (1 / 1000), 2.0**-0.5
HOLD = 125
"""Updates after a division during which the same scale is not divided again."""


@dataclass
class Counters:
    """Counts of gradient values that the cast to 16 bits flushed to zero."""

    seen: int = 0
    """Values that were non-zero before the cast."""
    flushed: int = 0
    """Of those, values that the cast made zero."""

    def note(self, exact: Tensor, rounded: Tensor) -> None:
        """Compare gradients before and after a cast."""
        real = exact != 0
        self.seen += int(real.sum())
        self.flushed += int((real & (rounded == 0)).sum())


@dataclass
class Scale:
    """One branch's gradient scale, with the state of its last backward pass."""

    value: float = FIRST
    since_division: int = HOLD
    """Updates since its last division."""
    flags: list[Tensor] = field(default_factory=list)
    """0-dim, of the parameter gradients since the last update: was each finite."""
    counters: Counters = field(default_factory=Counters)

    @property
    def finite(self) -> bool:
        """False if a parameter gradient of this branch was not; waits for the device."""
        return all(bool(flag) for flag in self.flags)

    def note(self, gradient: Tensor) -> None:
        """Remember whether a scaled gradient is finite, without waiting for the device."""
        self.flags.append(torch.isfinite(gradient).all())

    def update(self, finite: bool) -> None:
        """Grow after a finite update, else divide, at most once per HOLD updates."""
        self.since_division += 1
        if finite:
            self.value *= GROWTH
        elif self.since_division > HOLD:
            self.value *= SHRINK
            self.since_division = 0
        self.value = min(max(self.value, LEAST), MOST)
        self.flags.clear()


class Branch(nn.Module):
    """Marks where a residual branch begins and ends; does nothing unless it has a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Scale | None = None
        self.count = False
        """Count what 16 bits flush; slow."""

    def enter(self, x: Tensor) -> Tensor:
        """States in fp32 -> 16 bits; backward, the gradient is filtered and unscaled to fp32."""
        if self.scale is None:
            return x
        out: Tensor = _Enter.apply(x, self.scale)
        return out

    def leave(self, y: Tensor) -> Tensor:
        """The branch's output -> fp32; backward, the gradient is scaled and cast to 16 bits."""
        if self.scale is None:
            return y
        out: Tensor = _Leave.apply(y, self.scale, self.count)
        return out

    def watch(self, parameters: Sequence[nn.Parameter], scale: Scale) -> None:
        """Switch on: hooks check and unscale all gradients, and round matrices' to 16 bits."""
        self.scale = scale

        def unscale(gradient: Tensor) -> Tensor:
            rounded = gradient.half() if gradient.dim() > 1 else gradient
            if self.count:
                scale.counters.note(gradient, rounded)
            scale.note(rounded)
            return rounded.float() / scale.value

        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(unscale)


class Scales:
    """The scales of all branches of a model; `here` holds those of this rank."""

    def __init__(self, everywhere: Sequence[str], here: Mapping[str, Scale]) -> None:
        """`everywhere` names the branches of all stages, in the same order on all ranks."""
        self._everywhere, self.here = list(everywhere), dict(here)

    def broken(self, device: torch.device) -> Tensor:
        """For each branch of the model, 1 if this rank's gradients were not finite: (branches,)."""
        fine = torch.ones((), dtype=torch.bool, device=device)
        flags = [[fine, *(self.here[n].flags if n in self.here else ())] for n in self._everywhere]
        if not flags:
            return torch.zeros(0, dtype=torch.float64, device=device)
        return torch.stack([torch.stack(row).all() for row in flags]).logical_not().double()

    def update(self, broken: Tensor) -> None:
        """Update every scale by the sum of `broken` over all ranks."""
        for name, count in zip(self._everywhere, broken.tolist(), strict=True):
            if name in self.here:
                self.here[name].update(count == 0)

    def facts(self) -> dict[str, float]:
        """The range of this rank's scales, for the metrics."""
        values = [math.log2(scale.value) for scale in self.here.values()]
        if not values:
            return {}
        return {"scale_log2_min": min(values), "scale_log2_max": max(values)}


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Scale) -> Tensor:
        ctx.scale = scale
        return x.half().to(_inside(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].half().float()
        filtered = torch.nan_to_num(gradient, posinf=0.0, neginf=0.0)
        return filtered / ctx.scale.value, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Scale, count: bool) -> Tensor:
        ctx.scale, ctx.count, ctx.dtype = scale, count, y.dtype
        return y.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        exact = gradients[0] * ctx.scale.value
        rounded = exact.half()
        if ctx.count:
            ctx.scale.counters.note(exact, rounded)
        return rounded.to(ctx.dtype), None, None


def _inside(x: Tensor) -> torch.dtype:
    """Type that a branch computes in: fp16 on GPUs; else fp32 on 16-bit values (emulation)."""
    return torch.float16 if x.device.type == "cuda" else torch.float32
