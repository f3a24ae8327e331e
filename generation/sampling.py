"""Draw image tokens from a prior: many candidates of some captions at once, keyed one by one."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from core.errors import ConfigError
from core.keys import KeyPart
from generation.cache import Lane
from generation.choose import choose, guided
from generation.config import SampleConfig
from generation.decoder import Decoder
from generation.stages import Shared
from models.draws import gumbel_noise
from models.prior import PAD

Keys = list[list[tuple[KeyPart, ...]]]
"""For each caption the key of each of its candidates."""
_UNSURE = -1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A picture's codes, some of which are kept."""

    codes: Tensor
    """(grid * grid,) int64."""
    kept: Tensor
    """(grid * grid,) bool."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Some candidates that are finished."""

    captions: slice
    candidates: slice
    codes: Tensor
    """(captions, candidates, grid * grid) int64."""


class Sampler:
    """Decodes on this rank; all ranks of a model call `draw` together."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.config = decoder, decoder.config

    def draw(
        self, text: Tensor, keys: Keys, settings: SampleConfig, prompt: Prompt | None = None
    ) -> Iterator[Drawn]:
        """Draw candidates, `settings.batch` at a time, and hand them out as they are finished.

        Shapes: text (captions, text_length) int64, PAD behind a caption.
        """
        count = len(keys[0]) if keys else 0
        if len(keys) != len(text) or any(len(row) != count for row in keys):
            raise ConfigError(f"{len(text)} captions need as many lists of equally many keys")
        # the captions whose candidates all fit, or as many candidates of one as fit
        together = max(1, settings.batch // max(count, 1))
        each = min(count, settings.batch)
        for start in range(0, len(text), together):
            captions = slice(start, min(start + together, len(text)))
            for first in range(0, count, each):
                candidates = slice(first, min(first + each, count))
                mine = [row[candidates] for row in keys[captions]]
                lanes = [
                    _Lane(self.decoder, text[captions], part, settings, prompt)
                    for part in _split(mine, self.decoder.neighbours.size)
                ]
                codes = torch.cat(_decode(lanes, self.config.image_length), 1).cpu()
                yield Drawn(captions=captions, candidates=candidates, codes=codes)


def _split(keys: Keys, lanes: int) -> list[Keys]:
    """Deal the candidates to lanes, so that every stage of a pipeline has work."""
    count = len(keys[0])
    bounds = [count * i // lanes for i in range(lanes + 1)]
    return [[row[a:b] for row in keys] for a, b in pairwise(bounds) if a < b]


def _decode(lanes: "list[_Lane]", length: int) -> list[Tensor]:
    for position in range(length):
        for lane in lanes:
            lane.advance(position)
    return [lane.finish() for lane in lanes]


class _Lane:
    """Candidates that are decoded together."""

    def __init__(
        self,
        decoder: Decoder,
        text: Tensor,
        keys: Keys,
        settings: SampleConfig,
        prompt: Prompt | None,
    ) -> None:
        self._decoder, self._settings = decoder, settings
        length, device = decoder.config.image_length, decoder.device
        self._captions, self._each = len(text), len(keys[0])
        self._keys = [key for row in keys for key in row]
        self._text = text.to(device)
        self._codes = torch.zeros(len(self._keys), length, dtype=torch.int64, device=device)
        kept = torch.zeros(length, dtype=torch.bool, device="cpu")
        if prompt is not None:
            kept = prompt.kept.cpu()
            self._codes[:] = (prompt.codes.cpu() * kept).to(device)
        self._kept = kept.tolist()
        free = (~kept).nonzero().flatten()
        self._first, self._end = int(free[0]), int(free[-1]) + 1
        self._lane = self._start(self._text, self._codes[:1, : self._first], self._each)
        self._shared: Shared | None = None
        self._shared_at = 0

    def advance(self, position: int) -> None:
        """Decode one position of every candidate; one that is given is only read."""
        if not self._first <= position < self._end:
            return
        self._settle()
        logits = self._next(self._lane, position, self._codes)
        if self._kept[position]:
            return
        drawn = torch.full((len(self._keys),), _UNSURE, device=self._decoder.device)
        if logits is not None:
            choice = choose(logits, self._noise(self._keys, position), self._settings)
            precise = self._settings.precision == "fp32"
            drawn = choice.codes.where(choice.sure, _UNSURE) if precise else choice.codes
        self._shared, self._shared_at = self._decoder.neighbours.share(drawn), position

    def finish(self) -> Tensor:
        """(captions, each, grid * grid)."""
        self._settle()
        return self._codes.view(self._captions, self._each, -1)

    def _start(self, text: Tensor, given: Tensor, each: int) -> Lane:
        text = self._with_empty(text)
        return self._decoder.start(text, given.expand(len(text), -1), each)

    def _with_empty(self, text: Tensor) -> Tensor:
        """With guidance, as many empty captions behind the captions."""
        plain = self._settings.guidance == 1
        return text if plain else torch.cat([text, torch.full_like(text, PAD)])

    def _next(self, lane: Lane, position: int, codes: Tensor) -> Tensor | None:
        before = codes[:, max(position - 1, 0)]
        if self._settings.guidance == 1:
            return self._decoder.next(lane, position, before)
        logits = self._decoder.next(lane, position, before.repeat(2))
        return None if logits is None else guided(logits, self._settings.guidance)

    def _noise(self, keys: list[tuple[KeyPart, ...]], position: int) -> Tensor | None:
        if self._settings.temperature == 0:
            return None
        shape = (self._decoder.config.image_vocabulary,)
        rows = [gumbel_noise(shape, *key, position, "sample") for key in keys]
        return torch.stack(rows).to(self._decoder.device)

    def _settle(self) -> None:
        """Take the last position's codes; those that rounding could change are drawn again."""
        if self._shared is None:
            return
        codes, position = self._shared.wait(), self._shared_at
        self._shared = None
        self._codes[:, position] = codes
        for row in (codes == _UNSURE).nonzero().flatten().tolist():
            self._codes[row, position] = self._by_itself(row, position)

    def _by_itself(self, row: int, position: int) -> Tensor:
        """Draw one candidate's code from logits that do not depend on the others of its batch."""
        caption, guidance = row // self._each, self._settings.guidance
        text = self._with_empty(self._text[caption : caption + 1])
        image = self._codes[row : row + 1, : position + 1].expand(len(text), -1)
        logits = self._decoder.settled(text, image)
        drawn = torch.full((1,), _UNSURE, device=self._decoder.device)
        if logits is not None:
            logits = logits if guidance == 1 else guided(logits, guidance)
            noise = self._noise(self._keys[row : row + 1], position)
            drawn = choose(logits, noise, self._settings, settled=True).codes
        return self._decoder.neighbours.share(drawn).wait()[0]
