"""The suite shapes: held-out captions, judged whole and by attribute, for best of N.

Chance is the figure of the best pictures against shuffled captions; the upper bound is the figure
of the image tokenizer's reconstructions of pictures that the generator renders for the captions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.files.atomic import Json
from data_pipeline.evaluation_sets import open_evaluation
from data_pipeline.sources.drawn.shapes import Scene, Seen, parse_caption, read_picture, render
from data_pipeline.tokenize.encode import to_bytes
from generation.evaluation.accuracy import best_of_shares, derangement, draw_all, wilson_low
from generation.evaluation.suites.config import ShapesConfig
from generation.evaluation.suites.criteria import CRITERIA, Criterion
from generation.evaluation.suites.protocol import Inputs, Measured
from generation.text_to_image import Candidates, Studio

Judged = list[list[Seen]]
"""Objects of each candidate of a caption, in the order of drawing."""


class ShapesSuite:
    """Held-out captions of the shapes generator."""

    def __init__(self, prompts: list[Json], settings: ShapesConfig) -> None:
        self.prompts, self.facts, self._settings = prompts, Json(), settings
        self._scenes = [parse_caption(row["caption"]) for row in prompts]

    def measure(self, studio: Callable[[], Studio]) -> Measured:
        opened, captions = studio(), [row["caption"] for row in self.prompts]
        opened.tell_cut(captions)
        drawn = draw_all(opened, captions, self._settings.draws, "sample")
        objects = [objects_by_draw(row) for row in drawn]
        scores = np.stack([row.scores[np.argsort(row.drawn)] for row in drawn])
        best = [row[int(each.drawn[0])] for row, each in zip(objects, drawn, strict=True)]
        again = self._reconstructed(opened)
        rows = [
            self._row(name, criterion, objects, scores, best, again)
            for name, criterion in CRITERIA.items()
        ]
        count = self._settings.candidates
        results = {"prompts": len(captions), "candidates": count, "rows": rows}
        return Measured(results=results, headline=_headline(rows))

    def _row(
        self,
        name: str,
        criterion: Criterion,
        objects: list[Judged],
        scores: NDArray[Any],
        best: Judged,
        again: Judged,
    ) -> Json:
        """One sub-score, over the captions that say something of it."""
        places = [i for i, scene in enumerate(self._scenes) if criterion.applies(scene)]
        if not places:
            return {"score": name, "prompts": 0}
        scenes = [self._scenes[i] for i in places]
        right = np.array(
            [[criterion.holds(self._scenes[i], seen) for seen in objects[i]] for i in places]
        )
        shares = best_of_shares(right, scores[places])
        row = {
            "score": name,
            "prompts": len(places),
            "best_of": {str(count): share for count, share in shares.items()},
            "single_low95": wilson_low(shares[1], len(places)),
            "upper_bound": _share(criterion, scenes, [again[i] for i in places]),
        }
        if len(places) > 1:  # a single caption has none to be exchanged for
            shuffled = [scenes[i] for i in derangement(len(scenes), self._settings.seed)]
            row["chance"] = _share(criterion, shuffled, [best[i] for i in places])
        return row

    def _reconstructed(self, studio: Studio) -> Judged:
        """Objects of the reconstruction of a rendered picture of each caption."""
        side, seed = studio.images.facts.pixels, self._settings.seed
        true = np.stack([render(scene, side, seed, i) for i, scene in enumerate(self._scenes)])
        pixels = torch.from_numpy(true).permute(0, 3, 1, 2).float() / 255
        return [read_picture(each) for each in to_bytes(studio.decode(studio.encode(pixels)))]


def prepare(inputs: Inputs, settings: ShapesConfig, prompts: list[Json] | None) -> ShapesSuite:
    """Open the packed set and choose its captions by key, or take those of a file.

    Raises: InputError if a caption is not one of the shapes generator.
    """
    if prompts is None:
        chosen = open_evaluation(inputs.data)
        captions = chosen.choose(settings.prompts, settings.seed)
        prompts = [{"caption": caption.text} for caption in captions]
    return ShapesSuite(prompts, settings)


def objects_by_draw(row: Candidates) -> Judged:
    """The objects of each candidate, in the order of drawing."""
    return [read_picture(picture) for picture in row.pictures[np.argsort(row.drawn)]]


def _share(criterion: Criterion, scenes: Sequence[Scene], seen: Judged) -> float:
    pairs = zip(scenes, seen, strict=True)
    return float(np.mean([criterion.holds(scene, objects) for scene, objects in pairs]))


def _headline(rows: list[Json]) -> dict[str, float]:
    """The best of all candidates for each sub-score, and single samples for the whole caption."""
    last = {row["score"]: list(row["best_of"].items())[-1] for row in rows if row["prompts"]}
    count, share = last.pop("exact")
    figures = {f"exact, best of {count}": share}
    figures |= {"exact, single": rows[0]["best_of"]["1"]} if count != "1" else {}
    return figures | {f"{name}, best of {count}": share for name, (_, share) in last.items()}
