"""From captions to ranked pictures: sampler, dVAE and CLIP together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from core.errors import InputError
from core.settings import check
from data_pipeline.bpe import encode, load_tokenizer
from data_pipeline.images import decode_rgb, square
from generation.config import SampleConfig
from generation.ranking import Ranker, open_ranker
from generation.sampling import Sampler
from models.dvae import DVAE
from training.export import load_dvae, load_prior
from training.tasks import pad_text


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All pictures drawn for one caption, best first."""

    caption: str
    pictures: NDArray[np.uint8]
    """(N, S, S, 3), in rank order."""
    scores: NDArray[Any]
    """(N,) cosines, in rank order."""
    drawn: NDArray[Any]
    """(N,) which draw each was."""


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Finished models that belong together."""

    sampler: Sampler
    dvae: DVAE
    ranker: Ranker
    tokenizer: Tokenizer

    def draw(
        self, captions: list[str], settings: SampleConfig, prompt: Tensor | None = None
    ) -> list[Candidates]:
        """Draw, decode and rerank `settings.candidates` pictures of each caption.

        Shapes: prompt is None or (grid * grid,) codes whose first keep_rows rows are kept.
        """
        config = self.sampler.config
        check(settings.problems(config.grid))
        count = settings.candidates
        text = pad_text([encode(self.tokenizer, c) for c in captions], config.text_length)
        keys = [(settings.seed, caption, i) for caption in captions for i in range(count)]
        given = None
        if prompt is not None and settings.keep_rows:
            given = prompt[: settings.keep_rows * config.grid].repeat(len(keys), 1)
        codes = self.sampler.draw(text.repeat_interleave(count, 0), keys, settings, given)
        pixels = self.decode(codes)
        scores = self.score(captions, pixels, count)
        arrays = to_bytes(pixels).reshape(len(captions), count, *to_bytes(pixels[:1]).shape[1:])
        found = []
        for caption, pictures, row in zip(captions, arrays, scores, strict=True):
            order = np.argsort(-row, kind="stable")
            found.append(
                Candidates(
                    caption=caption, pictures=pictures[order], scores=row[order], drawn=order
                )
            )
        return found

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of codes, (B, 3, S, S) in [0, 1]."""
        return torch.cat([self.dvae.picture(part) for part in codes.split(256)])

    def score(self, captions: list[str], pixels: Tensor, count: int) -> NDArray[Any]:
        """The ranker's cosine of each caption with its `count` pictures, (captions, count)."""
        return self.ranker.scores(captions, pixels, count)

    @torch.no_grad()
    def codes_of_file(self, path: Path) -> Tensor:
        """The codes of an image file, (grid * grid,)."""
        if not path.is_file():
            raise InputError(f"there is no image {path}")
        image = square(decode_rgb(path.read_bytes(), str(path)), self.dvae.config.pixels)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        return self.dvae.tokens(pixels)[0]


def open_studio(prior: Path, dvae: Path, clip: Path, bpe: Path, step: int | None = None) -> Studio:
    """Load models and check that they were trained with one another.

    A run that has not ended gives its newest checkpoint; the prior that of `step`, if it is given.
    Raises: InputError if a hash differs.
    """
    layers, config, facts = load_prior(prior, step)
    model, dvae_hash = load_dvae(dvae)
    tokenizer, tokenizer_hash = load_tokenizer(bpe)
    wrong = [
        f"the prior in {prior} was trained on another dVAE than {dvae}"
        * (facts["dvae"] != dvae_hash),
        f"the prior in {prior} was trained with another tokenizer than {bpe}"
        * (facts["tokenizer"] != tokenizer_hash),
    ]
    if any(wrong):
        raise InputError("; ".join(text for text in wrong if text))
    ranker = open_ranker(clip, bpe)
    return Studio(sampler=Sampler(layers, config), dvae=model, ranker=ranker, tokenizer=tokenizer)


def to_bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """(B, 3, S, S) in [0, 1] -> (B, S, S, 3) uint8."""
    return np.asarray((pixels.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().numpy())


def picture_grid(rows: list[NDArray[np.uint8]], scale: int = 1, gap: int = 2) -> NDArray[np.uint8]:
    """Lay out rows of pictures, (n, S, S, 3) each, with white gaps, enlarged `scale` times."""
    padded = [
        np.pad(picture, ((0, gap), (0, gap), (0, 0)), constant_values=255)
        for row in rows
        for picture in row
    ]
    width = max(len(row) for row in rows)
    lines, at = [], 0
    for row in rows:
        line = np.concatenate(padded[at : at + len(row)], axis=1)
        missing = (width - len(row)) * padded[at].shape[1]
        lines.append(np.pad(line, ((0, 0), (0, missing), (0, 0)), constant_values=255))
        at += len(row)
    whole = np.concatenate(lines)
    return np.asarray(
        cv2.resize(whole, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST), np.uint8
    )
