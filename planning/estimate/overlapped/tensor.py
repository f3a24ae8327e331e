"""Tensor parallelism with sequence parallelism: gathers and reduce-scatters around each block."""

from collections.abc import Sequence
from dataclasses import replace

from planning.estimate.hardware import Hardware
from planning.estimate.kernels import Kernels, seconds
from planning.estimate.overlapped.decoder import matmuls
from planning.estimate.overlapped.sharded import ring_seconds
from planning.estimate.overlapped.step import Step

AGAIN = {"none": (0, 0), "norms": (2, 0), "selective": (2, 0), "full": (2, 1)}
"""Gathers and reduce-scatters that recompute repeats: it ends before the last reduce-scatter."""


def tensor_seconds(step: Step, hardware: Hardware) -> tuple[float, float]:
    """Seconds of a layer's collectives that nothing hides (forward, backward)."""
    if step.tensor == 1:
        return 0.0, 0.0
    state = 2.0 * step.micro * step.length * step.sizes.hidden
    each = ring_seconds(state, step.tensor, hardware)
    gathers, scatters = AGAIN[step.recompute]
    if not step.asynchronous:
        return 4 * each, (4 + gathers + scatters) * each
    products = matmuls(step)
    names = [("q", "k", "v"), ("gate", "up")] if step.sizes.gated else [("qkv",), ("up",)]
    before = sum(_beside([products[n] for n in row], each, step.tensor, hardware) for row in names)
    after = sum(
        _beside([products[n]], each, step.tensor, hardware) + _sum(state, each, step, hardware)
        for n in ("out", "down")
    )
    there = before + after
    return there, there + gathers / 2 * before + scatters / 2 * after


def _beside(work: Sequence[Kernels], each: float, parts: int, hardware: Hardware) -> float:
    """Seconds that a collective adds to matmuls which run in `parts`, a part ahead of its bytes."""
    part = seconds([replace(k, rows=-(-k.rows // parts)) for k in work], hardware)
    return part + (parts - 1) * max(part, each / (parts - 1)) - seconds(work, hardware)


def _sum(state: float, each: float, step: Step, hardware: Hardware) -> float:
    """The last part's way, and the sum of all parts on their owner."""
    moved = Kernels(moved=state * (1 + 1 / step.tensor))
    return each / step.tensor + seconds([moved], hardware)
