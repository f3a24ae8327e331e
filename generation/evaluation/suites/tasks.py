"""Tasks of the suite geneval-style; imports no torch. Source: arXiv 2310.11513, section 3."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipeline.sources.drawn.shapes import Scene, Seen
from generation.evaluation.suites.criteria import counted, placed, shows


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of GenEval's tasks."""

    suits: Callable[[Scene], bool]
    """True for captions of the task."""
    holds: Callable[[Scene, Sequence[Seen]], bool]
    """True if a picture solves it."""


def _other(scene: Scene, attribute: str) -> bool:
    """True if the caption has two things that differ in an attribute."""
    second = scene.second
    return second is not None and getattr(scene.first, attribute) != getattr(second, attribute)


TASKS = {
    "single object": Task(
        suits=lambda scene: scene.second is None,
        holds=lambda scene, seen: shows(scene, seen, ("shape",)),
    ),
    "two objects": Task(
        suits=lambda scene: _other(scene, "shape"),
        holds=lambda scene, seen: shows(scene, seen, ("shape",)),
    ),
    "counting": Task(suits=lambda scene: True, holds=counted),
    "colours": Task(
        suits=lambda scene: scene.second is None,
        holds=lambda scene, seen: shows(scene, seen, ("colour", "shape")),
    ),
    "size": Task(
        suits=lambda scene: scene.second is None,
        holds=lambda scene, seen: shows(scene, seen, ("size", "shape")),
    ),
    "position": Task(
        suits=lambda scene: _other(scene, "shape"),
        holds=lambda scene, seen: shows(scene, seen, ("shape",)) and placed(scene, seen),
    ),
    "colour attribution": Task(
        suits=lambda scene: _other(scene, "colour"),
        holds=lambda scene, seen: shows(scene, seen, ("colour", "shape")),
    ),
}
