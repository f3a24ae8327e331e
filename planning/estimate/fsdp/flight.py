"""Most that a stage keeps for its backward passes, by the order of its schedule."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pipelines.schedules import Schedule
from planning.estimate.overlapped.schedules import order


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that autograd saves of a micro-batch in a chunk of layers."""

    layers: int
    loss: int = 0
    """After the last layer; a zero bubble drops it with the gradients of inputs."""


def most_kept(
    schedule: Schedule, stage: int, stages: int, micro_batches: int, chunks: Sequence[Kept]
) -> int:
    """Peak bytes of a stage; `chunks`: its own, in the model's order."""
    now = peak = 0
    halves = schedule == "zero-bubble"
    for one in order(schedule, stage, stages, micro_batches, len(chunks)):
        kept = chunks[one.chunk]
        if one.kind == "forward":
            now += kept.layers + kept.loss
            peak = max(peak, now)
        elif one.kind == "weights":
            now -= kept.layers
        else:
            now -= kept.loss + (0 if halves else kept.layers)
    return peak
