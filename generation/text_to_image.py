"""From captions to ranked pictures: sampler, image tokenizer and CLIP together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from core.config import check
from core.errors import ConfigError, InputError
from core.files.atomic import write_atomic
from core.keys import KeyPart
from core.log import LOG, Meter
from core.memory import host_memory
from data_pipeline.images.crops import encode_png, square
from data_pipeline.images.decode import decode_rgb
from data_pipeline.text.bpe import encode, load_tokenizer
from data_pipeline.tokenize.encode import to_bytes
from generation.config import BATCH, DrawSettings, ModelPaths
from generation.ranking import Ranker, TapirRanker, in_parts, open_ranker, pictures_together
from generation.sampling.decoder import Decoder
from generation.sampling.load_prior import load_local_prior
from generation.sampling.sampler import Drawn, Keys, Prompt, Sampler
from generation.sampling.speculative import SpeculativeSampler
from models.tokenizers.protocol import ImageTokenizer
from parallel.mesh import Mesh
from parallel.precision import set_numerics
from training.export.tokenizers import open_tokenizer
from training.tasks.task import pad_text

Done = Callable[[slice, slice, NDArray[np.uint8]], None]
"""Called with slices of captions (c) and candidates (n), and their (c, n, S, S, 3) pictures."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All pictures drawn for one caption, best first."""

    caption: str
    pictures: NDArray[np.uint8]
    """(N, S, S, 3), in rank order."""
    scores: NDArray[Any]
    """(N,) cosines, in rank order."""
    drawn: NDArray[Any]
    """(N,) the candidate's number, in the order of drawing."""


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Prior, image tokenizer, ranker and BPE that were trained together."""

    sampler: Sampler
    images: ImageTokenizer
    ranker: Ranker | None
    """None: candidates stay in the order in which they were drawn."""
    tokenizer: Tokenizer
    caption_dropout: float = 0.0
    """Fraction of the prior's training captions that were replaced by the empty one."""

    def draw(
        self,
        captions: list[str],
        settings: DrawSettings,
        prompt: Prompt | None = None,
        done: Done | None = None,
    ) -> list[Candidates]:
        """Draw, decode and rerank `settings.candidates` pictures of each caption.

        `done` is called with pictures as they are finished, before ranking.
        """
        count = settings.candidates
        self.tell_guidance(settings)
        arrays = picture_buffer(len(captions), count, self.images.facts.pixels)
        scores = np.zeros((len(captions), count), np.float32)
        for drawn in self.codes(captions, settings, prompt):
            where = drawn.captions, drawn.candidates
            pixels = self.decode(drawn.codes.flatten(0, 1))
            scores[where] = self.score(captions[drawn.captions], pixels, drawn.codes.shape[1])
            arrays[where] = to_bytes(pixels).reshape(arrays[where].shape)
            if done is not None:
                done(*where, arrays[where])
        ranked = []
        for caption, pictures, row in zip(captions, arrays, scores, strict=True):
            order = np.argsort(-row, kind="stable")
            ranked.append(
                Candidates(
                    caption=caption, pictures=pictures[order], scores=row[order], drawn=order
                )
            )
        return ranked

    def codes(
        self,
        captions: list[str],
        settings: DrawSettings,
        prompt: Prompt | None = None,
        parts: Sequence[KeyPart] | None = None,
    ) -> Iterator[Drawn]:
        """Draw `settings.candidates` candidates of each caption, keyed by seed, caption, number.

        `parts`: of each caption one more part of its keys, before the number.
        """
        check(settings.problems())
        count, length = settings.candidates, self.sampler.config.text_length
        text = pad_text([encode(self.tokenizer, caption) for caption in captions], length)
        more = [()] * len(captions) if parts is None else [(part,) for part in parts]
        keys: Keys = [
            [(settings.seed, caption, *own, i) for i in range(count)]
            for caption, own in zip(captions, more, strict=True)
        ]
        return self.sampler.draw(text, keys, settings, prompt)

    def tell_guidance(self, settings: DrawSettings) -> None:
        """Warn of guidance by a prior that does not know the empty caption."""
        if settings.guidance != 1 and not self.caption_dropout:
            LOG.warning(
                "the prior was trained without --caption-dropout: it does not know the empty "
                "caption, and --guidance may do harm"
            )

    def unread(self, caption: str) -> list[str]:
        """A sentence for each model that reads less than the whole of a caption."""
        ids = encode(self.tokenizer, caption)
        return [
            f"the {model} reads the first {length} of the caption's {len(ids)} tokens: "
            f"{self.tokenizer.decode(ids[:length])!r}"
            for model, length in self._text_lengths().items()
            if len(ids) > length
        ]

    def tell_cut(self, captions: list[str]) -> None:
        """Warn of captions that are longer than the models' text length."""
        texts = [encode(self.tokenizer, caption) for caption in captions]
        for model, length in self._text_lengths().items():
            long = [ids for ids in texts if len(ids) > length]
            if long:
                LOG.warning(
                    "%d of %d captions have more than the %d tokens that the %s reads, and are "
                    "cut: of the first, with %d, it reads %r",
                    *(len(long), len(texts), length, model, len(long[0])),
                    self.tokenizer.decode(long[0][:length]),
                )

    def _text_lengths(self) -> dict[str, int]:
        lengths = {"prior": self.sampler.config.text_length}
        if isinstance(self.ranker, TapirRanker):
            lengths["CLIP"] = self.ranker.clip.config.text_length
        return lengths

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to pictures, (B, 3, S, S) in [0, 1]."""
        return self._through(self.images.pictures, codes)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pictures to codes, (B, 3, S, S) in [0, 1] -> (B, rows * columns)."""
        return self._through(self.images.codes, pixels)

    def _through(self, network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        device = self.images.device
        size = pictures_together(self.images.facts.pixels)
        return in_parts(lambda part: network(part.to(device)).cpu(), rows, size)

    def score(self, captions: list[str], pixels: Tensor, count: int) -> NDArray[Any]:
        """The ranker's cosine of each caption with its `count` pictures, (captions, count).

        Zeros without a ranker.
        """
        if self.ranker is None:
            return np.zeros((len(captions), count), np.float32)
        return self.ranker.scores(captions, pixels, count)

    def codes_of_file(self, path: Path) -> Tensor:
        """The codes of an image file, (rows * columns,)."""
        if not path.is_file():
            raise InputError(f"there is no image {path}")
        image = square(decode_rgb(path.read_bytes(), str(path)), self.images.facts.pixels)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        return self.encode(pixels)[0]


class Arrivals:
    """Counts finished candidates in a progress bar; writes each as a PNG if a folder is given."""

    def __init__(self, meter: Meter, folder: Path | None) -> None:
        self._meter, self._folder, self._count = meter, folder, 0

    def __call__(self, captions: slice, candidates: slice, pictures: NDArray[np.uint8]) -> None:
        self._count += pictures.shape[0] * pictures.shape[1]
        self._meter.update(self._count)
        for i, row in enumerate(pictures if self._folder else [], captions.start):
            for j, picture in enumerate(row, candidates.start):
                assert self._folder is not None
                write_atomic(self._folder / picture_name(i, j), encode_png(picture))


def picture_buffer(captions: int, count: int, side: int) -> NDArray[np.uint8]:
    """Allocate the buffer of all pictures, (captions, count, S, S, 3).

    Raises: ConfigError if it does not fit: touching its pages later would get the process killed.
    """
    each, free = count * side * side * 3, host_memory()[0]
    if (captions + 1) * each <= free:  # one more caption: sorting copies its pictures
        try:
            return np.zeros((captions, count, side, side, 3), np.uint8)
        except MemoryError:
            pass
    raise ConfigError(
        f"{count:,} candidates of {captions:,} captions are {captions * each / 1e9:.1f} GB of "
        f"pictures, kept until they are ranked, and {free / 1e9:.1f} GB of memory are free: ask "
        "for fewer candidates, or for some of the captions at a time"
    )


def picture_name(caption: int, candidate: int) -> str:
    """File name of one candidate."""
    return f"caption-{caption:03d}-candidate-{candidate:03d}.png"


def open_studio(
    models: ModelPaths,
    precision: str = "fp32",
    mesh: Mesh | None = None,
    one_row: bool = False,
    together: int = 1,
    rerank: bool = True,
    batch: int = BATCH,
) -> Studio:
    """Load models and check by their hashes that they were trained together.

    Of an unfinished run the newest checkpoint is loaded; of a prior that of `models.step` if set.
    Each rank of a mesh holds its part of the prior on its own device; all call `codes` together.
    `one_row`: candidates are drawn one at a time; `together`: codes of a candidate that a pass
    decodes; `rerank`: open a CLIP; `batch`: candidates that are decoded together.
    Raises: InputError if a hash differs.
    """
    mesh = mesh or Mesh()
    device = mesh.world.device
    set_numerics(device, deterministic=False)  # else Inductor sorts KV-cache writes: slow
    part, facts = load_local_prior(models.prior, models.step, mesh)
    images = open_tokenizer(models.dvae, device)
    tokenizer, tokenizer_hash = load_tokenizer(models.bpe)
    wrong = [
        f"the prior in {models.prior} was trained on another dVAE than {models.dvae}"
        * (facts["dvae"] != images.facts.digest),
        f"the prior in {models.prior} draws {part.config.image_length} tokens, and the pictures of "
        f"{models.dvae} have {images.facts.tokens}; import it with the pixels that the tokens had"
        * (part.config.image_length != images.facts.tokens),
        f"the prior in {models.prior} was trained with another tokenizer than {models.bpe}"
        * (facts["tokenizer"] != tokenizer_hash),
    ]
    if any(wrong):
        raise InputError("; ".join(text for text in wrong if text))
    side = images.facts.pixels
    decoder = Decoder(part, precision, one_row and together == 1, together)
    return Studio(
        sampler=(Sampler if together == 1 else SpeculativeSampler)(decoder, batch=batch),
        images=images,
        ranker=open_ranker(models.clip, models.bpe, device, side) if rerank else None,
        tokenizer=tokenizer,
        caption_dropout=float(facts.get("caption_dropout", 0.0)),
    )


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
