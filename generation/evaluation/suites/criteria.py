"""What a picture of shapes has of its caption, by attribute and by GenEval's tasks.

Imports no torch.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

from data_pipeline.sources.drawn.shapes import Scene, Seen, Thing, fits, related

ATTRIBUTES = ("size", "colour", "shape")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One sub-score."""

    holds: Callable[[Scene, Sequence[Seen]], bool]
    pairs_only: bool = False
    """True if it is of captions with two things alone."""

    def applies(self, scene: Scene) -> bool:
        """True if the caption says something of it."""
        return scene.second is not None or not self.pairs_only


def things_of(scene: Scene) -> list[Thing]:
    """The one or two things of a caption."""
    return [scene.first] if scene.second is None else [scene.first, scene.second]


def shows(scene: Scene, seen: Sequence[Seen], attributes: Sequence[str]) -> bool:
    """True if each thing of the caption has an object of its own with these attributes.

    Further objects do no harm; counting notices them.
    """
    caption, picture = things_of(scene), [each.thing for each in seen]
    return Counter(_values(caption, attributes)) <= Counter(_values(picture, attributes))


def counted(scene: Scene, seen: Sequence[Seen]) -> bool:
    """True if the picture has as many objects as the caption."""
    return len(seen) == len(things_of(scene))


def placed(scene: Scene, seen: Sequence[Seen]) -> bool:
    """True if the relation holds between the two objects most like the caption's things.

    Of pairs with as many attributes in common, one is enough.
    """
    alike = {pair: _common(scene, pair) for pair in permutations(seen, 2)}
    most = max(alike.values(), default=0)
    return any(common == most and related(*pair, scene.relation) for pair, common in alike.items())


CRITERIA = {
    "exact": Criterion(holds=fits),
    "counting": Criterion(holds=counted),
    "colour": Criterion(holds=lambda scene, seen: shows(scene, seen, ("colour",))),
    "size": Criterion(holds=lambda scene, seen: shows(scene, seen, ("size",))),
    "shape": Criterion(holds=lambda scene, seen: shows(scene, seen, ("shape",))),
    "two objects": Criterion(
        holds=lambda scene, seen: shows(scene, seen, ATTRIBUTES), pairs_only=True
    ),
    "position": Criterion(holds=placed, pairs_only=True),
}
"""Sub-scores by name; exact = all attributes, the count and the position."""


def _values(things: Iterable[Thing], attributes: Sequence[str]) -> list[Hashable]:
    return [tuple(getattr(thing, name) for name in attributes) for thing in things]


def _common(scene: Scene, pair: Sequence[Seen]) -> int:
    """Attributes that two objects share with the caption's two things, 0 to 6."""
    return sum(
        getattr(thing, name) == getattr(seen.thing, name)
        for thing, seen in zip(things_of(scene), pair, strict=True)
        for name in ATTRIBUTES
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of the tasks of the suite geneval-style. Source: arXiv 2310.11513, section 3."""

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
