"""The suite clipscore: 2.5 times the cosine of CLIP between a caption and its picture, if positive.

The judge is an open_clip checkpoint in a local folder (--judge). Without one the CLIP that ranks
the candidates judges them too: a proxy. So is a CLIP by Tapir, which has seen one training set.
Source: arXiv 2104.08718, section 3 (without references).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.files.atomic import Json
from core.log import progress
from data_pipeline.evaluation_sets import open_evaluation
from generation.evaluation.accuracy import CHUNK, derangement
from generation.evaluation.suites.config import ClipscoreConfig
from generation.evaluation.suites.protocol import Inputs, Measured
from generation.ranking import OpenClipRanker, Ranker, open_ranker
from generation.text_to_image import Candidates, Studio
from parallel.device import CPU
from training.export.tokenizers import facts_in

WEIGHT = 2.5
"""w of the paper, which stretches the score to about [0, 1]."""
PREFIX = "A photo depicts "
"""Put before a caption for open_clip, as in the paper; a CLIP by Tapir has not learnt it."""


class ClipscoreSuite:
    """Captions of any set, judged by a CLIP."""

    def __init__(
        self, prompts: list[Json], judge: Ranker, settings: ClipscoreConfig, clip: str
    ) -> None:
        """`clip`: digest of the CLIP that ranks the candidates."""
        self.prompts, self._judge, self._settings = prompts, judge, settings
        self.facts: Json = {
            "label": label_of(judge, clip),
            "judge": judge.name,
            "judge_digest": judge.digest,
            "prefix": PREFIX if isinstance(judge, OpenClipRanker) else "",
            "weight": WEIGHT,
        }

    def measure(self, studio: Callable[[], Studio]) -> Measured:
        opened, captions = studio(), [row["caption"] for row in self.prompts]
        opened.tell_cut(captions)
        order = derangement(len(captions), self._settings.seed)
        by_draw, best, chance = [], [], []
        shuffled = [captions[i] for i in order]
        with progress("sample and judge", len(captions)) as meter:
            for start in range(0, len(captions), CHUNK):
                part = slice(start, start + CHUNK)
                for row, other in zip(
                    opened.draw(captions[part], self._settings.draws), shuffled[part], strict=True
                ):
                    scores = self._scores(row)
                    best.append(scores[0])
                    chance.append(self._score(other, row.pictures[:1])[0])
                    by_draw.append(scores[np.argsort(row.drawn)])
                meter.update(len(best))
        results = _figures(np.stack(by_draw), np.array(best), np.array(chance))
        label, count = self.facts["label"], self._settings.candidates
        headline = {f"{label}, best of {count}": results["best"], "single": results["single"]}
        return Measured(results={**self.facts, **results}, headline=headline)

    def _scores(self, row: Candidates) -> NDArray[Any]:
        """CLIPScore of all candidates of a caption, in rank order, (N,)."""
        return self._score(row.caption, row.pictures)

    def _score(self, caption: str, pictures: NDArray[np.uint8]) -> NDArray[Any]:
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(CPU)
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
        text = f"{self.facts['prefix']}{caption}"
        return clip_scores(self._judge.scores([text], pixels, len(pictures))[0])


def label_of(judge: Ranker, clip: str) -> str:
    """The score's name by the judge's role; `clip`: digest of the CLIP that ranks."""
    if judge.digest == clip:
        return "proxy CLIPScore (CLIP of the run)"
    return "CLIPScore" if isinstance(judge, OpenClipRanker) else "proxy CLIPScore (CLIP by Tapir)"


def clip_scores(cosines: NDArray[Any]) -> NDArray[Any]:
    """CLIPScore of cosines, in float64."""
    return np.asarray(WEIGHT * np.maximum(cosines.astype(np.float64), 0.0))


def prepare(
    inputs: Inputs, settings: ClipscoreConfig, prompts: list[Json] | None
) -> ClipscoreSuite:
    """Open the judge; choose captions of the set by key, or take those of a file.

    Raises: InputError if the set or the checkpoint is missing or does not fit.
    """
    place = settings.judge or inputs.models.clip
    side = facts_in(inputs.models.dvae).pixels
    judge = open_ranker(place, inputs.models.bpe, inputs.device, side)
    if prompts is None:
        captions = open_evaluation(inputs.data).choose(settings.captions, settings.seed)
        prompts = [{"caption": caption.text} for caption in captions]
    return ClipscoreSuite(prompts, judge, settings, inputs.digests["clip"])


def _figures(by_draw: NDArray[Any], best: NDArray[Any], chance: NDArray[Any]) -> Json:
    """Means over captions: of all candidates, of the ranked best, and of shuffled captions."""
    return {
        "prompts": len(best),
        "single": float(by_draw.mean()),
        "best": float(best.mean()),
        "best_std": float(best.std()),
        "chance": float(chance.mean()),
    }
