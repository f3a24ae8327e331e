"""What the ranks of `bench network` are asked for, and what they measure; imports no torch."""

from dataclasses import dataclass, field

from bench.support.sizes import sized
from models.config import PriorConfig

MODEL = PriorConfig(
    dim=sized(512, 128),
    heads=8,
    layers=sized(6, 1),
    text_length=6,
    text_vocabulary=512,
    image_vocabulary=512,
    grid=4,
)
RANK = MODEL.dim // 8
FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a rank measures."""

    contenders: list[str]
    samples: int = 2
    """Of a rank's batch, at most 16."""
    steps: int = 1
    """Of a contender in a round."""
    rounds: int = 1


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Seconds of a step that reduces nothing, by what plan calls a unit."""

    forward: float
    """With the first unit's backward pass: the hook sees their end."""
    backward: dict[str, float]
    """In the order of the backward pass."""


@dataclass(kw_only=True)
class Figures:
    """What a rank measured."""

    seconds: dict[str, list[float]]
    """Of a step by contender and round."""
    sent: dict[str, int]
    """Bytes of a step that go between the machines, by contender."""
    parameters: int = 0
    bandwidth: float = 0.0
    """Of an all-reduce's payload, in bytes a second, as the advisor measures it."""
    latency: float = 0.0
    break_even: float = 0.0
    """The advisor's."""
    passes: list[Passes] = field(default_factory=list)
    units: dict[str, int] = field(default_factory=dict)
    """Bytes of each unit's gradient, in the order of the backward pass."""
    factored: dict[str, int] = field(default_factory=dict)
    """Bytes that are sent of the units whose matrices are factored."""
    alone: list[float] = field(default_factory=list)
    """Seconds of the hook's reductions with nothing beside them, by round."""
