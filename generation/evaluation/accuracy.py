"""Caption accuracy on shapes: are ALL attributes of the caption in the picture?

For best-of-N, N draws of a caption are ranked by CLIP and the best one is checked (figure 6 of the
paper in small). Chance is the accuracy against shuffled captions; the upper bound is the accuracy
of the dVAE's reconstructions of the true pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from core.keys import keyed_rng
from core.log import progress
from data_pipeline.formats.raw import RawRecord
from data_pipeline.sources.drawn.shapes import matches, parse_caption
from data_pipeline.tokenize.encode import pictures_of, to_bytes
from generation.config import DrawSettings
from generation.text_to_image import Candidates, Studio

CHUNK = 32
"""Captions drawn between two progress updates."""
Figures = dict[str, Any]
"""Fractions by name; under "guidance", fractions by scale."""


def draw_all(
    studio: Studio, captions: list[str], settings: DrawSettings, name: str
) -> list[Candidates]:
    """Draw candidates of many captions, with a progress bar."""
    candidates: list[Candidates] = []
    with progress(name, len(captions)) as meter:
        for start in range(0, len(captions), CHUNK):
            candidates += studio.draw(captions[start : start + CHUNK], settings)
            meter.update(len(candidates))
    return candidates


def draw_for(
    studio: Studio, captions: list[str], settings: DrawSettings, most: int, few: int
) -> list[Candidates]:
    """Draw candidates of all captions: `most` for the first `few` if that is more than usual."""
    few = few if most > settings.candidates else 0
    wide = replace(settings, candidates=most) if few else settings
    first = draw_all(studio, captions[:few], wide, "sample many") if few else []
    return first + draw_all(studio, captions[few:], settings, "sample")


def caption_accuracy(
    studio: Studio, records: Sequence[RawRecord], drawn: list[Candidates], seed: int
) -> Figures:
    """Measure best-of-N for N = 1, 2, 4, ..., beside chance and the upper bound.

    Larger N are measured on the first captions alone, which have enough candidates.
    Raises: InputError if a caption is not one of the shapes generator.
    """
    captions = [record.caption for record in records]
    for caption in captions:
        parse_caption(caption)
    if not captions:
        raise InputError("there are no held-out captions to measure accuracy on")
    shuffled = [captions[i] for i in derangement(len(captions), seed)]
    figures: Figures = {"prompts": len(captions)}
    for count, (share, of) in _best_of(captions, drawn).items():
        figures[f"best_of_{count}"] = share
        figures[f"best_of_{count}_low95"] = wilson_low(share, of)
        if of < len(captions):
            figures[f"best_of_{count}_prompts"] = of
    best = [row.pictures[0] for row in drawn]
    figures["chance"] = _share(shuffled, best)
    pixels = pictures_of(list(records), studio.images.facts.pixels)
    again = studio.decode(studio.encode(pixels))
    figures["reconstruction"] = _share(captions, to_bytes(again))
    figures["checker_on_truth"] = _share(captions, to_bytes(pixels))
    return figures


def guidance_accuracy(
    studio: Studio,
    records: Sequence[RawRecord],
    settings: DrawSettings,
    scales: Sequence[float],
    guided: int = 0,
) -> dict[str, float]:
    """Accuracy of single samples for each scale, on the first `guided` captions; 0 = all."""
    captions = [record.caption for record in records][: guided or None]
    shares = {}
    for scale in scales:
        single = replace(settings, candidates=1, guidance=scale)
        rows = draw_all(studio, captions, single, f"guidance {scale:g}")
        shares[f"{scale:g}"] = _share(captions, [row.pictures[0] for row in rows])
    return shares


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << i for i in range(most.bit_length())]


def best_of_shares(right: NDArray[np.bool_], scores: NDArray[Any]) -> dict[int, float]:
    """Fraction of captions whose best-ranked of N draws is right, for N = 1, 2, 4, ...

    This is the exact mean over all subsets of N of the D draws: the draw at rank k wins a subset
    if it is in it and the N - 1 others rank after k.
    Shapes: (captions, draws) each, in the order of the draws.
    """
    draws = right.shape[1]
    order = np.argsort(-scores, 1, kind="stable")
    ranked = np.take_along_axis(right, order, 1).mean(0)
    shares = {}
    for count in counts_up_to(draws):
        choices = math.comb(draws, count)
        wins = [math.comb(draws - 1 - rank, count - 1) / choices for rank in range(draws)]
        shares[count] = float(ranked @ np.array(wins))
    return shares


def _best_of(captions: Sequence[str], drawn: list[Candidates]) -> dict[int, tuple[float, int]]:
    """N -> (fraction of captions whose best of N is right, number of captions measured).

    The first captions may have more candidates than the others.
    """
    least, most = len(drawn[-1].drawn), len(drawn[0].drawn)
    judged = [_judged([caption], [row]) for caption, row in zip(captions, drawn, strict=True)]
    shares: dict[int, tuple[float, int]] = {}
    for limit in dict.fromkeys((least, most)):
        rows = [(right, scores) for right, scores in judged if right.shape[1] >= limit]
        right = np.concatenate([right[:, :limit] for right, _ in rows])
        scores = np.concatenate([scores[:, :limit] for _, scores in rows])
        for count, share in best_of_shares(right, scores).items():
            shares.setdefault(count, (share, len(rows)))
    return shares


def _judged(
    captions: Sequence[str], drawn: list[Candidates]
) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Whether each draw fits its caption, and its score, in the order of the draws."""
    right = np.zeros((len(drawn), len(drawn[0].drawn)), bool)
    scores = np.zeros(right.shape, np.float32)
    for i, (caption, row) in enumerate(zip(captions, drawn, strict=True)):
        right[i, row.drawn] = [matches(caption, picture) for picture in row.pictures]
        scores[i, row.drawn] = row.scores
    return right, scores


def wilson_low(share: float, count: int, z: float = 1.96) -> float:
    """Lower end of the 95% Wilson interval of a fraction."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count))


def _share(captions: Sequence[str], pictures: Sequence[Any] | NDArray[Any]) -> float:
    pairs = zip(captions, pictures, strict=True)
    return float(np.mean([matches(caption, picture) for caption, picture in pairs]))


def derangement(count: int, seed: int) -> NDArray[Any]:
    """A keyed permutation without fixed points."""
    order = keyed_rng(seed, count, "accuracy/shuffle").permutation(count)
    wrong = np.empty(count, np.int64)
    wrong[order] = np.roll(order, 1)
    return wrong
