"""Cut a list of layers into stages of about equal cost."""

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Costed(Protocol):
    """Something with a cost, e.g. a layer."""

    @property
    def cost(self) -> int: ...


C = TypeVar("C", bound=Costed)


def stage_layers(layers: Sequence[C], stage: int, stages: int) -> Sequence[C]:
    """The layers that one pipeline stage holds."""
    starts = balanced_starts([layer.cost for layer in layers], stages)
    return layers[starts[stage] : starts[stage + 1]]


def balanced_starts(costs: Sequence[int], stages: int) -> list[int]:
    """First layer of each stage, then the end; minimises the cost of the most expensive stage.

    No stage is empty. Among equal cuts the earlier stages get more layers: they start first.
    Raises: ValueError for more stages than layers.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be cut into {stages} stages")
    low, high = max(costs), sum(costs)
    while low < high:
        limit = (low + high) // 2
        low, high = (low, limit) if _fits(costs, stages, limit) else (limit + 1, high)
    return _cut(costs, stages, low)


def _fits(costs: Sequence[int], stages: int, limit: int) -> bool:
    return _cut(costs, stages, limit)[-1] == len(costs)


def _cut(costs: Sequence[int], stages: int, limit: int) -> list[int]:
    """Fill each stage up to the limit, leaving a layer for every later stage."""
    starts, at = [0], 0
    for stage in range(stages):
        filled, most = 0, len(costs) - (stages - stage - 1)
        while at < most and (filled + costs[at] <= limit):
            filled += costs[at]
            at += 1
        starts.append(at)
    return starts
