"""A keyed generator of two-panel pictures: one figure above, the same one changed below.

The captions are those of the paper's image-to-image translation (figure 14): "the exact same shape
on the top colored red on the bottom". They do not say what is above, so that a model must read it
from the picture. A panel is 8 cells high and 16 wide; figures are centred on cells, and a cell is
a token of a dVAE that reduces the picture to 16 x 16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from core.keys import keyed_rng
from data_pipeline.sources.drawn.shapes import AREA, BACKGROUND, COLOURS, SUPERSAMPLE, Image

CELLS = 8
"""Height of a panel in cells; it is twice as wide."""
LINE_COLOUR = "black"
FILLS = tuple(name for name in COLOURS if name != LINE_COLOUR)
ROWS, COLUMNS = (3, 4), tuple(range(3, 13))
"""Cells of a figure's centre: the largest figure fits around each."""
TILE = 7
"""Cells along the side of the largest figure, and of the square in which figures are drawn."""
EXTENT = {"plain": 5, "large": 7, "outlined": 5, "stamp": 5}
"""Cells along the side of a figure's bounding box, by style."""
STAMP_EXTENT, LINE_WIDTH = 3, 0.5
"""Cells along the side of a figure inside a stamp's frame; cells across an outline or frame."""
_BAR = 0.4
"""Width of a cross's or a T's bar as a fraction of the figure."""

Coverage = NDArray[np.float32]


def _bars(*rectangles: tuple[float, float, float, float]) -> list[list[tuple[float, float]]]:
    return [[(a, b), (c, b), (c, d), (a, d)] for a, b, c, d in rectangles]


_POLYGONS: dict[str, list[list[tuple[float, float]]]] = {
    "square": _bars((-1, -1, 1, 1)),
    "diamond": [[(0, -1), (1, 0), (0, 1), (-1, 0)]],
    "cross": _bars((-_BAR, -1, _BAR, 1), (-1, -_BAR, 1, _BAR)),
    "triangle": [[(0, -1), (1, 1), (-1, 1)]],
    "triangle upside-down": [[(0, 1), (1, -1), (-1, -1)]],
    "T": _bars((-1, -1, 1, 2 * _BAR - 1), (-_BAR, -1, _BAR, 1)),
    "T upside-down": _bars((-1, 1 - 2 * _BAR, 1, 1), (-_BAR, -1, _BAR, 1)),
}
"""Corners (x to the right, y down) in the figure's bounding box, [-1, 1] along each axis."""
FORMS = ("circle", *_POLYGONS)
_TURNED = {
    "triangle": "triangle upside-down",
    "triangle upside-down": "triangle",
    "T": "T upside-down",
    "T upside-down": "T",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What a panel shows: one figure."""

    form: str
    colour: str
    row: int
    """Cell of its centre, counted from the panel's top."""
    column: int
    style: str = "plain"

    def __str__(self) -> str:
        style = "" if self.style == "plain" else f"{self.style} "
        return f"{style}{self.colour} {self.form} at {self.row},{self.column}"


def _flipped(panel: Panel) -> Panel:
    return replace(panel, form=_TURNED.get(panel.form, panel.form), row=CELLS - 1 - panel.row)


_UPPER: dict[str, tuple[Any, ...]] = {
    "form": FORMS,
    "colour": FILLS,
    "row": ROWS,
    "column": COLUMNS,
}
"""Attributes of an upper panel and their values."""
OPERATIONS: dict[str, Callable[[Panel], Panel]] = {
    "same": lambda panel: panel,
    "red": lambda panel: replace(panel, colour="red"),
    "flipped": _flipped,
    "larger": lambda panel: replace(panel, style="large"),
    "outline": lambda panel: replace(panel, style="outlined"),
    "stamp": lambda panel: replace(panel, style="stamp"),
}
"""From the upper panel to the lower one."""
CAPTIONS = {
    "same": "the exact same shape on the top and on the bottom",
    "red": "the exact same shape on the top colored red on the bottom",
    "flipped": "the exact same shape on the top reflected upside-down on the bottom",
    "larger": "the exact same shape on the top larger on the bottom",
    "outline": "the exact same shape on the top with an outline on the bottom",
    "stamp": "the exact same shape on the top as a small stamp on the bottom",
}


def draw_panels(seed: int, index: int) -> tuple[str, Panel]:
    """Draw operation and upper panel number `index`; depends on (seed, index) alone.

    No red figure is coloured red: every operation but `same` changes the figure.
    """
    rng = keyed_rng(seed, index, "panels")
    operation = str(rng.choice(list(OPERATIONS)))
    fills = [name for name in FILLS if (operation, name) != ("red", "red")]
    top = Panel(
        form=str(rng.choice(FORMS)),
        colour=str(rng.choice(fills)),
        row=int(rng.choice(ROWS)),
        column=int(rng.choice(COLUMNS)),
    )
    return operation, top


def panel_json(panel: Panel) -> dict[str, Any]:
    """An upper panel as JSON."""
    return {name: getattr(panel, name) for name in _UPPER}


def panel_of(body: Any) -> Panel:
    """The upper panel of a JSON mapping.

    Raises: InputError if it is none.
    """
    known = isinstance(body, dict) and set(body) == set(_UPPER)
    if not known or any(not _is_one_of(body[name], values) for name, values in _UPPER.items()):
        raise InputError(
            f"{body!r} is no upper panel: it needs "
            + ", ".join(f"{name} (of {', '.join(map(str, v))})" for name, v in _UPPER.items())
        )
    return Panel(**body)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """True for one of some values, of the same type: 3.0 is no row."""
    return any(type(value) is type(each) and value == each for each in values)


def operation_of(caption: str) -> str:
    """The operation that a caption asks for.

    Raises: InputError for any text but the generator's captions.
    """
    for operation, text in CAPTIONS.items():
        if text == caption:
            return operation
    raise InputError(f"{caption!r} is not a caption of the panels generator")


def render_pair(operation: str, top: Panel, pixels: int) -> Image:
    """Render a panel above its changed copy.

    Shapes: returns (2 * pixels, 2 * pixels, 3) uint8 RGB.
    """
    return np.concatenate([render_panel(x, pixels) for x in (top, OPERATIONS[operation](top))])


def render_panel(panel: Panel, pixels: int) -> Image:
    """Render one panel.

    Shapes: returns (pixels, 2 * pixels, 3) uint8 RGB; pixels is a multiple of CELLS.
    """
    unit, fill, line = pixels // CELLS, *_tile(panel.form, panel.style, pixels // CELLS)
    ink = fill[..., None] * _colour(panel.colour) + line[..., None] * _colour(LINE_COLOUR)
    background = np.array(BACKGROUND, np.float32)
    image = np.empty((pixels, 2 * pixels, 3), np.uint8)
    image[:] = BACKGROUND
    top, left = ((x - TILE // 2) * unit for x in (panel.row, panel.column))
    blended = ink + (1 - fill - line)[..., None] * background
    image[top : top + TILE * unit, left : left + TILE * unit] = blended.round()
    return image


def blank_below(image: Image) -> Image:
    """Replace the lower panel by the background."""
    blank = image.copy()
    blank[len(image) // 2 :] = BACKGROUND
    return blank


def _colour(name: str) -> NDArray[np.float32]:
    return np.array(COLOURS[name], np.float32)


@cache
def _tile(form: str, style: str, unit: int) -> tuple[Coverage, Coverage]:
    """Fraction of each pixel that a figure's fill and its lines cover, (TILE * unit,) * 2 each."""
    whole = _mask(form, STAMP_EXTENT if style == "stamp" else EXTENT[style], unit)
    line = np.zeros_like(whole)
    if style == "outlined":
        line = whole - _eroded(whole, unit)
    elif style == "stamp":
        frame = _mask("square", EXTENT[style], unit)
        line = frame - _eroded(frame, unit)
    side = (TILE * unit,) * 2
    fill, lines = (
        np.asarray(cv2.resize(mask.astype(np.float32), side, interpolation=AREA), np.float32)
        for mask in (whole * (1 - line), line)
    )
    return fill, lines


def _mask(form: str, cells: int, unit: int) -> NDArray[np.uint8]:
    """A form of `cells` cells in the middle of the supersampled tile, 1 inside."""
    side, half = TILE * unit * SUPERSAMPLE, cells * unit * SUPERSAMPLE / 2
    middle = np.arange(side) + 0.5 - side / 2
    x, y = middle[None] / half, middle[:, None] / half
    if form == "circle":
        return (x**2 + y**2 <= 1).astype(np.uint8)
    mask: Any = np.zeros((side, side), np.uint8)
    for corners in _POLYGONS[form]:
        points = np.array(corners) * (half - 0.5) + side / 2 - 0.5
        cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)
    return np.asarray(mask)


def _eroded(mask: NDArray[np.uint8], unit: int) -> NDArray[np.uint8]:
    width = 2 * round(LINE_WIDTH * unit * SUPERSAMPLE) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    return np.asarray(cv2.erode(mask, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0))
