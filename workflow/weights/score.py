"""Score shipped models as their card says, from captions alone."""

from dataclasses import replace

import numpy as np

from core.errors import InputError
from data_pipeline.sources.drawn.shapes import matches
from generation.config import DrawSettings, ModelPaths
from generation.evaluation.accuracy import draw_all
from generation.shipped import Score
from generation.text_to_image import open_studio
from parallel.mesh import own_mesh
from workflow.weights.recipes import COSINE, EXACT


def score_of(models: ModelPaths, score: Score) -> float:
    """Draw for the captions of a score; returns its value.

    Raises: InputError for a score of another name.
    """
    if score.name not in (EXACT, COSINE):
        raise InputError(f"there is no score {score.name!r}; known are {EXACT} and {COSINE}")
    studio = open_studio(models, mesh=own_mesh())
    draws = DrawSettings(
        candidates=score.candidates, temperature=score.temperature, guidance=score.guidance
    )
    rows = draw_all(studio, list(score.captions), draws, "score")
    if score.name == COSINE:
        return float(np.mean([row.scores[0] for row in rows]))
    return float(np.mean([matches(row.caption, row.pictures[0]) for row in rows]))


def scored(models: ModelPaths, score: Score, captions: list[str]) -> Score:
    """The score with its captions and its value."""
    given = replace(score, captions=tuple(dict.fromkeys(captions)))
    return replace(given, value=score_of(models, given))
