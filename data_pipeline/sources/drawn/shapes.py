"""An unlimited, keyed generator of captioned pictures, and a checker that reads them back.

A picture holds one object ("a small red circle") or two with a relation
("a small red circle above a large blue square"). The checker classifies the
objects of a picture by colour, size and the ideal outline with the highest overlap.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from core.keys import keyed_rng

BACKGROUND = (240, 240, 240)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 60, 230),
    "yellow": (240, 200, 20),
    "purple": (160, 40, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "below", "left of", "right of")
EXTENT = {"small": 0.25, "large": 0.42}
"""Width of an object as a fraction of the picture's side."""
BETWEEN_SIZES = 0.335
AREA = cv2.INTER_AREA
"""OpenCV's area interpolation: a pixel is the mean of the finer pixels inside it."""
SUPERSAMPLE, FINE = 8, 4
"""Samples along a pixel's side, for pictures and for the checker's outlines."""
SINGLE_OBJECT_SHARE = 0.25
SMALLEST_OBJECT = 0.012
"""The checker ignores blobs that cover less than this fraction of the picture."""

_OBJECT = rf"a (small|large) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?")

Image = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """The attributes of one object."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of a caption: one thing, or two with a relation."""

    first: Thing
    relation: str | None = None
    second: Thing | None = None

    @property
    def caption(self) -> str:
        return f"{self.first} {self.relation} {self.second}" if self.second else str(self.first)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A thing that the checker detected in a picture, with its centre in pixels."""

    thing: Thing
    x: float
    y: float


def draw_scene(seed: int, index: int) -> Scene:
    """Draw the scene number `index`; depends on (seed, index) alone."""
    rng = keyed_rng(seed, index, "shapes/scene")
    first, second = _draw_thing(rng), _draw_thing(rng)
    if rng.random() < SINGLE_OBJECT_SHARE:
        return Scene(first=first)
    return Scene(first=first, relation=str(rng.choice(RELATIONS)), second=second)


def render(scene: Scene, pixels: int, seed: int, index: int) -> Image:
    """Render a scene at a keyed random position.

    Shapes: returns (pixels, pixels, 3) uint8 RGB.
    """
    rng = keyed_rng(seed, index, "shapes/place")
    canvas = np.empty((pixels * SUPERSAMPLE,) * 2 + (3,), np.uint8)
    canvas[0] = BACKGROUND
    canvas[1:] = canvas[0]
    if scene.second is None:
        _paint(canvas, scene.first, *rng.uniform(0.36, 0.64, 2))
    else:
        across = rng.uniform(0.3, 0.7, 2)
        along = np.array([rng.uniform(0.22, 0.27), rng.uniform(0.73, 0.78)])
        if scene.relation in ("below", "right of"):
            along = along[::-1]
        sideways = scene.relation in ("left of", "right of")
        for i, thing in enumerate((scene.first, scene.second)):
            x, y = (along[i], across[i]) if sideways else (across[i], along[i])
            _paint(canvas, thing, x, y)
    return np.asarray(cv2.resize(canvas, (pixels, pixels), interpolation=AREA), np.uint8)


def parse_caption(caption: str) -> Scene:
    """Parse a caption of this generator into its scene.

    Raises: InputError for any other text.
    """
    match = _CAPTION.fullmatch(caption)
    if not match:
        raise InputError(f"{caption!r} is not a caption of the shapes generator")
    size, colour, shape, relation, *other = match.groups()
    first = Thing(size=size, colour=colour, shape=shape)
    if relation is None:
        return Scene(first=first)
    second = Thing(size=other[0], colour=other[1], shape=other[2])
    return Scene(first=first, relation=relation, second=second)


def read_picture(image: Image) -> list[Seen]:
    """Detect the objects of a picture.

    Shapes: image is (side, side, 3) uint8 RGB.
    """
    side = image.shape[0]
    names = list(COLOURS)
    palette = np.array([BACKGROUND, *COLOURS.values()], np.float32)
    away = image[:, :, None].astype(np.float32) - palette
    nearest = np.einsum("yxpc,yxpc->yxp", away, away).argmin(-1)
    cover = _coverage(image, palette, nearest)
    solid = (cover > 0.5).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=4)
    objects = []
    for label in range(1, count):
        inside = labels == label
        if stats[label, cv2.CC_STAT_AREA] < SMALLEST_OBJECT * side * side:
            continue
        core = cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        votes = nearest[core if core.sum() >= 4 else inside]
        colour = int(np.bincount(votes[votes > 0], minlength=len(palette)).argmax())
        if colour > 0:
            objects.append(_describe(inside, cover, names[colour - 1], side))
    return objects


def matches(caption: str, image: Image) -> bool:
    """True if the picture shows ALL attributes of the caption, and nothing else."""
    return fits(parse_caption(caption), read_picture(image))


def fits(scene: Scene, seen: Sequence[Seen]) -> bool:
    """True if the objects of a picture are those of a scene, with all attributes, and no others."""
    if scene.second is None:
        return len(seen) == 1 and seen[0].thing == scene.first
    if len(seen) != 2:
        return False
    return any(
        (a.thing, b.thing) == (scene.first, scene.second) and related(a, b, scene.relation)
        for a, b in permutations(seen)
    )


def _draw_thing(rng: np.random.Generator) -> Thing:
    return Thing(
        size=str(rng.choice(list(EXTENT))),
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(SHAPES)),
    )


def _paint(canvas: Image, thing: Thing, x: float, y: float) -> None:
    side = canvas.shape[0]
    half = EXTENT[thing.size] * side / 2
    cx, cy = x * side, y * side
    colour: Any = COLOURS[thing.colour]
    if thing.shape == "circle":
        cv2.circle(canvas, (round(cx), round(cy)), round(half), colour, -1)
        return
    if thing.shape == "square":
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    else:
        corners = [(0, -1), (1, 1), (-1, 1)]
    points = np.array([(cx + dx * half, cy + dy * half) for dx, dy in corners])
    cv2.fillPoly(canvas, [points.round().astype(np.int32)], colour)


def _coverage(image: Image, palette: NDArray[Any], nearest: NDArray[Any]) -> NDArray[Any]:
    """Estimate the covered fraction of each pixel from its colour distance to the background.

    The distance is relative to the most distant palette colour among the neighbours, so that an
    edge pixel is compared with the object's own colour.
    """
    background = palette[0]
    away = np.sqrt(((image.astype(np.float32) - background) ** 2).sum(-1))
    full = np.sqrt(((palette - background) ** 2).sum(-1))[nearest]
    reach = cv2.dilate(full, np.ones((3, 3), np.uint8))
    return np.asarray(np.clip(away / np.maximum(reach, 1.0), 0.0, 1.0))


def _describe(inside: NDArray[Any], cover: NDArray[Any], colour: str, side: int) -> Seen:
    near = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    soft = np.where(near, cover, 0.0)
    area = float(soft.sum())
    height, width = (float(soft.max(axis).sum()) for axis in (1, 0))
    ideal = _outlines(_edge(soft.max(0)), _edge(soft.max(1)), width, height, side)
    alike = {name: _overlap(soft, outline) for name, outline in ideal.items()}
    size = "large" if max(height, width) > BETWEEN_SIZES * side else "small"
    grid = np.arange(side) + 0.5
    x, y = float(soft.sum(0) @ grid) / area, float(soft.sum(1) @ grid) / area
    shape = max(alike, key=lambda name: alike[name])
    return Seen(thing=Thing(size=size, colour=colour, shape=shape), x=x, y=y)


def _edge(profile: NDArray[Any]) -> float:
    """Subpixel position at which a coverage profile begins."""
    first = int(np.argmax(profile >= 0.5)) + 1
    return first - float(profile[:first].sum())


def _outlines(
    left: float, top: float, width: float, height: float, side: int
) -> dict[str, NDArray[Any]]:
    """Coverage of each ideal shape in this bounding box, (side, side) each."""
    fine = (np.arange(side * FINE) + 0.5) / FINE
    across, down = ((fine - left) / width)[None], ((fine - top) / height)[:, None]
    square = (across >= 0) & (across <= 1) & (down >= 0) & (down <= 1)
    whole = {
        "circle": (across - 0.5) ** 2 + (down - 0.5) ** 2 <= 0.25,
        "square": square,
        "triangle": square & (np.abs(across - 0.5) <= down / 2),
    }
    return {
        name: np.asarray(cv2.resize(inside.astype(np.float64), (side, side), interpolation=AREA))
        for name, inside in whole.items()
    }


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Intersection over union of two coverages."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def related(a: Seen, b: Seen, relation: str | None) -> bool:
    """True if the first object is in this relation to the second, along the longer axis."""
    dx, dy = b.x - a.x, b.y - a.y
    signed = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation or ""]
    return signed > 0 and signed == max(abs(dx), abs(dy))
