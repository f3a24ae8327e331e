"""The straggler heat map: each rank's own work over its peers', by rank and step."""

from dataclasses import dataclass

import numpy as np
from rich.style import Style
from rich.text import Text

_LEVELS = (1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Ratios from which a cell is drawn hotter."""
_SIGNS = ".-=+*#@"
_COLORS = ("#e8f0e8", "#fff3b0", "#ffd166", "#f9a03f", "#f3722c", "#d62828", "#7a0019")
_CELL, _LEFT, _TOP = 10, 70, 24
"""Pixels."""


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A heat map; each cell is a mean over several steps."""

    ranks: list[int]
    first: list[int]
    """Step at which each column begins."""
    cells: np.ndarray
    """(ranks, columns): ratio to the peers; 1 = equal."""


def heat_of(
    ratios: np.ndarray, numbers: np.ndarray, steps: np.ndarray, columns: int, most_ranks: int
) -> Heat:
    """Average steps into columns, and keep the ranks with the highest maximum.

    Shapes: ratios (ranks, steps), numbers (ranks,) of the ranks, steps (steps,).
    """
    parts = np.array_split(np.arange(len(steps)), min(columns, len(steps)))
    cells = np.stack([ratios[:, part].mean(1) for part in parts], 1)
    hottest = np.argsort(-cells.max(1), kind="stable")[:most_ranks]
    rows = sorted(hottest)
    first = [int(steps[part[0]]) for part in parts]
    return Heat(ranks=[int(numbers[row]) for row in rows], first=first, cells=cells[rows])


def level(ratio: float) -> int:
    """Heat level of a ratio, 0 to 6."""
    return int(np.searchsorted(_LEVELS, ratio, side="right"))


def as_text(heat: Heat) -> Text:
    """The heat map as coloured text."""
    text = Text()
    for rank, row in zip(heat.ranks, heat.cells, strict=True):
        text.append(f"rank {rank:>5} ")
        for cell in row:
            hot = level(float(cell))
            text.append(_SIGNS[hot], Style(color="black", bgcolor=_COLORS[hot]))
        text.append(f"  {row.mean():.2f}\n")
    text.append(f"steps {heat.first[0]} to the last; ")
    for sign, least in zip(_SIGNS[1:], _LEVELS, strict=True):
        text.append(f"{sign} from {least:g}x  ")
    return text


def as_svg(heat: Heat) -> str:
    """The heat map as SVG; hot cells have tooltips."""
    rows, columns = heat.cells.shape
    width, height = _LEFT + columns * _CELL + 10, _TOP + rows * _CELL + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="9">',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{columns * _CELL}" height="{rows * _CELL}" '
        f'fill="{_COLORS[0]}"/>',
    ]
    for i, rank in enumerate(heat.ranks):
        y = _TOP + i * _CELL
        parts.append(f'<text x="4" y="{y + 8}">rank {rank}</text>')
        for j, cell in enumerate(heat.cells[i]):
            hot = level(float(cell))
            if hot:
                parts.append(
                    f'<rect x="{_LEFT + j * _CELL}" y="{y}" width="{_CELL}" height="{_CELL}" '
                    f'fill="{_COLORS[hot]}"><title>rank {rank}, from step {heat.first[j]}: '
                    f"{cell:.2f}x</title></rect>"
                )
    for j in range(0, columns, max(1, columns // 8)):
        parts.append(f'<text x="{_LEFT + j * _CELL}" y="{_TOP - 6}">{heat.first[j]}</text>')
    for k, least in enumerate(_LEVELS):
        x, y = _LEFT + k * 60, _TOP + rows * _CELL + 10
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{_COLORS[k + 1]}"/>')
        parts.append(f'<text x="{x + 14}" y="{y + 9}">{least:g}x</text>')
    return "".join([*parts, "</svg>"])
