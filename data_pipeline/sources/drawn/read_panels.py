"""The checker of two-panel pictures: reads each panel back into what it shows.

It measures colour and place, renders every form and style there, and takes the closest one.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from data_pipeline.sources.drawn.panels import (
    CELLS,
    COLUMNS,
    EXTENT,
    FILLS,
    FORMS,
    OPERATIONS,
    ROWS,
    Panel,
    render_panel,
)
from data_pipeline.sources.drawn.shapes import BACKGROUND, COLOURS, Image

MOST_WRONG = 0.15
"""Pixels of another colour than the closest figure's, as a fraction of the figure, above which a
panel shows no figure."""
LEAST_INK = 0.25
"""A row or column belongs to a figure if so much of a cell in it is not background."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Both panels of a picture; None where there is no figure."""

    top: Panel | None
    bottom: Panel | None


def read_pair(image: Image) -> Reading:
    """Read both panels.

    Shapes: image is (side, side, 3) uint8 RGB.
    Raises: InputError if its side is no multiple of 2 * CELLS.
    """
    side = len(image)
    if image.shape[:2] != (side, side) or side % (2 * CELLS):
        raise InputError(
            f"a picture of {image.shape[1]}x{image.shape[0]} pixels has no two panels; they are "
            f"square, with a side that is a multiple of {2 * CELLS}"
        )
    upper, lower = image[: side // 2], image[side // 2 :]
    return Reading(top=read_panel(upper), bottom=read_panel(lower))


def read_panel(image: Image) -> Panel | None:
    """What a panel shows; None if it is no figure, or something is beside it.

    Shapes: image is (pixels, 2 * pixels, 3) uint8 RGB.
    """
    labels = _labels(image)
    colour, cell = _fill_colour(labels), _cell(labels > 0, len(image) // CELLS)
    if colour is None or cell is None:
        return None
    panels = [
        Panel(form=form, colour=colour, row=cell[0], column=cell[1], style=style)
        for form, style in product(FORMS, EXTENT)
    ]
    rendered = [render_panel(panel, len(image)) for panel in panels]
    away = [np.square(image.astype(np.float32) - ideal).sum() for ideal in rendered]
    best = int(np.argmin(away))
    ideal = _labels(rendered[best])
    wrong = _inner(ideal) & (labels != ideal)
    return panels[best] if wrong.sum() <= MOST_WRONG * (ideal > 0).sum() else None


def follows(operation: str, top: Panel, bottom: Panel | None) -> bool:
    """True if the lower panel is exactly what the operation makes of the upper one."""
    return bottom == OPERATIONS[operation](top)


def _labels(image: Image) -> NDArray[np.intp]:
    """Nearest colour of each pixel: 0 background, 1 and up those of COLOURS."""
    palette = np.array([BACKGROUND, *COLOURS.values()], np.float32)
    away = image[:, :, None].astype(np.float32) - palette
    return np.asarray(np.einsum("yxpc,yxpc->yxp", away, away).argmin(-1))


def _inner(labels: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Pixels whose four neighbours have their own label: the others mix two colours."""
    padded = np.pad(labels, 1, mode="edge")
    middle = padded[1:-1, 1:-1]
    sides = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.asarray(np.all([side == middle for side in sides], 0))


def _fill_colour(labels: NDArray[Any]) -> str | None:
    """The most frequent colour that fills figures."""
    counts = np.bincount(labels.ravel(), minlength=1 + len(COLOURS))
    shares = {name: int(counts[1 + i]) for i, name in enumerate(COLOURS) if name in FILLS}
    colour = max(shares, key=lambda name: shares[name])
    return colour if shares[colour] else None


def _cell(ink: NDArray[np.bool_], unit: int) -> tuple[int, int] | None:
    """Cell (row, column) of the bounding box's middle; None if no figure fits around it."""
    middle = []
    for axis, cells in ((1, ROWS), (0, COLUMNS)):
        inside = np.flatnonzero(ink.sum(axis) >= max(1, LEAST_INK * unit))
        if not len(inside):
            return None
        cell = int((inside[0] + inside[-1] + 1) / 2 // unit)
        if cell not in cells:
            return None
        middle.append(cell)
    return middle[0], middle[1]
