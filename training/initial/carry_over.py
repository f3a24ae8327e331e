"""How the weights of one model are carried over to another of the same kind, by global name.

| tensors | rule |
|---|---|
| of the same shape | taken |
| rows of the text vocabulary | by token string, if the tokenizers differ; a token that the stored tokenizer lacks gets the mean of the rows of its pieces (arXiv 2402.09977) |
| rows of image codes | taken if both models read the same dVAE's codes, else drawn: a code of another dVAE means something else |
| rows and columns of the token grid | interpolated linearly; patches of CLIP in two dimensions |
| text positions, padding by position | the first ones; the last one repeats in longer texts |
| all others | drawn from the run's seed, as without stored weights |
"""  # noqa: E501

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint.tensors import Shapes

How = Literal["taken", "resized", "new"]
Change = Callable[[Tensor], Tensor]
"""Stored tensor -> this model's."""
Pieces = Sequence[Sequence[int]]
"""For each token: the stored token with its string, or the stored tokens that spell it."""

_WORDS = re.compile(r"embedding\.text\.table\.weight|head\.text\.(weight|bias)|clip\.words\.weight")
_CODES = re.compile(r"embedding\.image\.table\.weight|head\.image\.(weight|bias)")
_GRID = re.compile(r"embedding\.(row|column)\.weight")
_TEXT = re.compile(r"embedding\.(text_position|pad)\.weight|clip\.word_place\.weight")
_PATCHES = re.compile(r"clip\.place\.weight")


@dataclass(frozen=True, kw_only=True)
class Carried:
    """How one tensor of a model gets its initial values."""

    name: str
    how: How
    rule: str
    """The rule in words."""
    stored: tuple[int, ...] | None
    """Shape of the stored tensor; None if there is none."""
    shape: tuple[int, ...]
    change: Change | None = None
    """Of a resized tensor."""


@dataclass(frozen=True, kw_only=True)
class Vocabularies:
    """What rows of the two models mean."""

    pieces: Pieces | None = None
    """The stored tokens of each token; None if the tokenizers are the same."""
    same_codes: bool = True
    """True if both models read the codes of the same dVAE."""


def carry(expected: Shapes, stored: Shapes, vocabularies: Vocabularies) -> dict[str, Carried]:
    """How each tensor gets its initial values, by global name."""
    return {
        name: _carry(name, tuple(shape), stored.get(name), vocabularies)
        for name, shape in expected.items()
    }


def _carry(
    name: str, shape: tuple[int, ...], stored: tuple[int, ...] | None, by: Vocabularies
) -> Carried:
    def made(how: How, rule: str, change: Change | None = None) -> Carried:
        return Carried(name=name, how=how, rule=rule, stored=stored, shape=shape, change=change)

    if stored is None:
        return made("new", "not stored")
    if _CODES.fullmatch(name) and not by.same_codes:
        return made("new", "codes of another dVAE")
    if len(stored) != len(shape) or stored[1:] != shape[1:]:
        return made("new", "another width")
    if _WORDS.fullmatch(name) and by.pieces is not None:
        return made("resized", *_by_pieces(by.pieces))
    if stored == shape:
        return made("taken", "same shape")
    if _GRID.fullmatch(name):
        return made("resized", "interpolated linearly", lambda x: interpolate_rows(x, shape[0]))
    if _TEXT.fullmatch(name):
        return made("resized", "first positions", lambda x: extend_rows(x, shape[0]))
    if _PATCHES.fullmatch(name) and _is_square(stored[0]) and _is_square(shape[0]):
        return made("resized", "interpolated in 2-D", lambda x: interpolate_grid(x, shape[0]))
    return made("new", "another shape")


def _by_pieces(pieces: Pieces) -> tuple[str, Change]:
    alone = sum(len(each) == 1 for each in pieces)
    rule = f"{alone} rows by token string, {len(pieces) - alone} means of the rows of their pieces"
    return rule, lambda x: rows_by_pieces(x, pieces)


def rows_by_pieces(stored: Tensor, pieces: Pieces) -> Tensor:
    """Each row is the mean of the stored rows of its pieces; one piece is copied bit for bit.

    Shapes: (V, ...) -> (len(pieces), ...).
    """
    counts = torch.tensor([len(each) for each in pieces], device=stored.device)
    rows = torch.tensor(list(chain.from_iterable(pieces)), device=stored.device)
    owners = torch.repeat_interleave(torch.arange(len(pieces), device=stored.device), counts)
    sums = stored.new_zeros(len(pieces), *stored.shape[1:]).index_add_(0, owners, stored[rows])
    return sums / counts.view(-1, *[1] * (stored.dim() - 1))


def interpolate_rows(stored: Tensor, rows: int) -> Tensor:
    """Linear interpolation along axis 0 between the centres of cells: (n, dim) -> (rows, dim)."""
    flat = stored.T[None]
    return F.interpolate(flat, size=rows, mode="linear")[0].T.contiguous()


def interpolate_grid(stored: Tensor, count: int) -> Tensor:
    """Bilinear interpolation of a square grid in raster order: (n * n, dim) -> (count, dim)."""
    before, after = isqrt(len(stored)), isqrt(count)
    grid = stored.view(before, before, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(after, after), mode="bilinear")
    return grid[0].permute(1, 2, 0).reshape(count, -1)


def extend_rows(stored: Tensor, rows: int) -> Tensor:
    """The first rows; the last one repeats if there are fewer: (n, dim) -> (rows, dim)."""
    return stored[torch.arange(rows, device=stored.device).clamp_max(len(stored) - 1)]


def _is_square(count: int) -> bool:
    return isqrt(count) ** 2 == count


def table(carried: Mapping[str, Carried], stored: Shapes) -> list[str]:
    """Lines for people: each tensor that was resized, new or left; layers of one fate in one."""
    rows = [
        (each.name, _text(each.stored), _text(each.shape), f"{each.how}: {each.rule}")
        for each in carried.values()
    ]
    left = sorted(set(stored) - set(carried))
    rows += [(name, _text(stored[name]), "-", "left: this model has none") for name in left]
    layers: dict[str, list[tuple[str, str, str, str]]] = {}
    for row in rows:
        layers.setdefault(row[0].partition(".")[0], []).append(row)
    shown = [("tensor", "stored", "here", "how")]
    for layer, inside in layers.items():
        fates = {row[3] for row in inside}
        if len(fates) == 1 < len(inside):
            inside = [(f"{layer}.*", f"{len(inside)} tensors", "", fates.pop())]
        shown += [row for row in inside if not row[3].startswith("taken")]
    if len(shown) == 1:
        return []
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in shown]


def _text(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape)) or "1"
