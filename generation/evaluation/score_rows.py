"""From blocks of features to rows of FID and IS, and a table of them."""

import functools
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from generation.evaluation.blocks import Blocks
from models.critics.fid import ClassSums, Moments, frechet_distance, inception_score, part_of

DRAWN, REAL = "drawn", "real"
Masks = dict[str, NDArray[np.bool_]]
"""Which captions' pictures (DRAWN) and which real pictures (REAL) count."""


def features(radius: float) -> str:
    """Name of the array of features at a radius."""
    return f"features/{radius}"


READABLE = "readable"
"""Name of the array with 1 for each real picture that decodes; older blocks lack it: all do."""


def logits(radius: float) -> str:
    """Name of the array of logits at a radius."""
    return f"logits/{radius}"


def score_row(blocks: Blocks, masks: Masks, radius: float) -> dict[str, Any]:
    """FID and IS at one radius of blur, of the pictures that count."""
    drawn, real = (_moments(blocks, kind, masks[kind], radius) for kind in (DRAWN, REAL))
    mean, spread = inception_score(_class_sums(blocks, masks[DRAWN], radius))
    return {
        "radius": radius,
        "fid": frechet_distance(drawn, real),
        "is": mean,
        "is_std": spread,
        "captions": drawn.count,
        "pictures": real.count,
    }


def _moments(blocks: Blocks, kind: str, mask: NDArray[np.bool_], radius: float) -> Moments:
    parts = blocks.read(kind, features(radius))
    return functools.reduce(operator.add, (Moments.of(rows[mask[part]]) for part, rows in parts))


def _class_sums(blocks: Blocks, mask: NDArray[np.bool_], radius: float) -> list[ClassSums]:
    """Class sums of each part of the captions, which are ordered by key."""
    count, place = int(mask.sum()), 0
    by_part: dict[int, ClassSums] = {}
    for part, every in blocks.read(DRAWN, logits(radius)):
        rows = every[mask[part]]
        places = np.array([part_of(place + i, count) for i in range(len(rows))], np.int64)
        for number in np.unique(places).tolist():
            sums = ClassSums.of(rows[places == number])
            by_part[number] = by_part[number] + sums if number in by_part else sums
        place += len(rows)
    return [by_part[number] for number in sorted(by_part)]


def table(scores: dict[str, Any]) -> str:
    """The scores as a text table."""
    lines = [scores["label"], f"{'set':<16} {'radius':>6} {'FID':>9} {'IS':>7} {'+-':>6}"]
    for row in scores["rows"]:
        numbers = f"{row['fid']:9.4g} {row['is']:7.3f} {row['is_std']:6.3f}"
        lines.append(f"{row['set']:<16} {row['radius']:>6g} {numbers}")
    return "\n".join(lines)
