"""From codes to PNGs: finished pictures with their scores, and unfinished ones row by row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.images.crops import encode_png
from data_pipeline.tokenize.encode import to_bytes
from generation.ranking import pictures_together
from generation.text_to_image import Studio
from serving.ranks.schedule import Advance, Job


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a request."""

    job: Job
    candidate: int
    row: int
    """Rows of tokens that are drawn, if it is unfinished; else 0."""
    png: bytes
    score: float
    """The ranker's cosine; 0 without a ranker, and of unfinished pictures."""
    codes: Tensor
    """(rows * columns,) int64."""


@dataclass(frozen=True, kw_only=True)
class _Due:
    job: Job
    candidate: int
    row: int
    codes: Tensor


class PixelDecoder:
    """Collects codes and decodes them together: networks run on parts of a fixed size anyway.

    A part of fewer pictures takes the time of a full one, so finished pictures wait for each other,
    at most `patience` steps.
    """

    def __init__(self, studio: Studio, patience: int) -> None:
        self._studio, self._patience = studio, patience
        self._full = pictures_together(studio.images.facts.pixels)
        self._columns = studio.sampler.config.grid_columns
        self._due: list[_Due] = []
        self._waited = 0

    def add(self, advance: Advance) -> None:
        """Take what a step drew, if it ends a picture or a row that the request asks for."""
        job, progress = advance.job, advance.progress
        if progress.finished:
            self._put(advance, 0, progress.codes)
            return
        drawn = progress.position + 1
        row, rest = divmod(drawn, self._columns)
        if rest or row not in job.draw.partials:
            return
        length = self._studio.sampler.config.image_length
        codes = torch.zeros(length, dtype=torch.int64, device="cpu")
        if job.prompt is not None:
            codes = job.prompt.codes.clone()
        codes[:drawn] = progress.codes
        self._put(advance, row, codes)

    def _put(self, advance: Advance, row: int, codes: Tensor) -> None:
        due = _Due(job=advance.job, candidate=advance.candidate, row=row, codes=codes)
        self._due.append(due)

    def drop(self, number: int) -> None:
        """Forget the pictures of a cancelled request."""
        self._due = [due for due in self._due if due.job.draw.job != number]

    def take(self, idle: bool) -> list[Picture]:
        """Decode what is due: if it fills a part, has waited enough, or nothing else is to do."""
        if not self._due:
            return []
        self._waited += 1
        if not idle and len(self._due) < self._full and self._waited < self._patience:
            return []
        due, self._due, self._waited = self._due, [], 0
        pixels = self._studio.decode(torch.stack([each.codes for each in due]))
        pictures = to_bytes(pixels)
        scores = self._scores(due, pixels)
        return [
            Picture(
                job=each.job,
                candidate=each.candidate,
                row=each.row,
                png=encode_png(picture),
                score=score,
                codes=each.codes,
            )
            for each, picture, score in zip(due, pictures, scores, strict=True)
        ]

    def _scores(self, due: list[_Due], pixels: Tensor) -> list[float]:
        scores = [0.0] * len(due)
        ends = [i for i, each in enumerate(due) if not each.row]
        if ends:
            captions = [due[i].job.draw.caption for i in ends]
            for i, score in zip(ends, self._studio.score(captions, pixels[ends], 1), strict=True):
                scores[i] = float(score[0])
        return scores
