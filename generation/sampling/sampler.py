"""Draw image tokens from a prior: batches of candidates, each with a random key of its own."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from core.errors import ConfigError, no_memory
from core.keys import KeyPart, key_int
from generation.config import BATCH, DrawSettings
from generation.sampling.batches import Need, batches, fitting, free_memory, without_memory
from generation.sampling.decoder import Decoder
from generation.sampling.draw import choose, guided
from generation.sampling.kv_cache import Lane
from generation.sampling.pipeline import Shared
from models.keyed_noise import gumbel_noise
from models.prior import PAD

Keys = list[list[tuple[KeyPart, ...]]]
"""Random key of each candidate, by caption."""
UNSURE = -1
"""In place of a code that rounding could have changed; `redraw` draws it."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A picture's codes, or those of a picture for each caption; some of them are kept."""

    codes: Tensor
    """(image_length,) or (captions, image_length) int64."""
    kept: Tensor
    """(image_length,) bool."""

    def part(self, captions: slice) -> "Prompt":
        """The prompt of some of the captions."""
        return self if self.codes.dim() == 1 else replace(self, codes=self.codes[captions])


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Finished candidates of some captions."""

    captions: slice
    candidates: slice
    codes: Tensor
    """(captions, candidates, image_length) int64."""


class Sampler:
    """Decodes on this rank; all ranks of a model call `draw` together."""

    def __init__(
        self,
        decoder: Decoder,
        free: Callable[[torch.device], int] = free_memory,
        batch: int = BATCH,
    ) -> None:
        """`free`: bytes that this rank may take for decoding on a device.

        `batch`: candidates decoded together, if they fit there.
        """
        self.decoder, self.config = decoder, decoder.config
        self._free, self._batch = free, batch

    def draw(
        self, text: Tensor, keys: Keys, settings: DrawSettings, prompt: Prompt | None = None
    ) -> Iterator[Drawn]:
        """Draw candidates batch by batch, and yield each batch when it is finished.

        A batch is made smaller if its caches do not fit into free memory.
        Shapes: text (captions, text_length) int64, padded with PAD.
        Raises: ConfigError if the caches of one candidate do not fit, or the prompt is of other
        captions.
        """
        count = len(keys[0]) if keys else 0
        if len(keys) != len(text) or any(len(row) != count for row in keys):
            raise ConfigError(f"{len(text)} captions need as many lists of equally many keys")
        if prompt is not None and prompt.codes.dim() > 1 and len(prompt.codes) != len(text):
            raise ConfigError(f"{len(text)} captions need as many prompts, not {len(prompt.codes)}")
        if not count:
            return
        most = self._fitting(len(text), count, settings, prompt)
        waiting = deque(batches(len(text), count, most))
        while waiting:
            batch = waiting.popleft()
            if batch.rows > most:
                waiting.extendleft(reversed(batch.halves()))
                continue
            mine = [row[batch.candidates] for row in keys[batch.captions]]
            given = None if prompt is None else prompt.part(batch.captions)
            codes = self._codes(text[batch.captions], mine, settings, given)
            if codes is None:
                halves = without_memory(batch, self.decoder.device, self.decoder.alone)
                waiting.extendleft(reversed(halves))
                most = halves[-1].rows
                continue
            yield Drawn(captions=batch.captions, candidates=batch.candidates, codes=codes)

    def _fitting(
        self, captions: int, count: int, settings: DrawSettings, prompt: Prompt | None
    ) -> int:
        """The batch size that fits into free memory."""
        decoder = self.decoder
        need = Need(
            caches=decoder.caches,
            captions=captions,
            candidates=count,
            given=span(prompt, self.config.image_length)[0],
            streams=1 if settings.guidance == 1 else 2,
            lanes=decoder.neighbours.size,
        )
        free = self._free(decoder.device)
        return fitting(need, self._batch, free, decoder.device, decoder.least)

    def _codes(
        self, text: Tensor, keys: Keys, settings: DrawSettings, prompt: Prompt | None
    ) -> Tensor | None:
        """Codes of a batch, (captions, candidates, image_length); None if memory ran out."""
        try:
            return self._decoded(text, keys, settings, prompt).cpu()
        except (MemoryError, RuntimeError) as error:
            if not no_memory(error):
                raise
            return None  # the caches are gone with this frame

    def _decoded(
        self, text: Tensor, keys: Keys, settings: DrawSettings, prompt: Prompt | None
    ) -> Tensor:
        """Codes of a batch that fits, (captions, candidates, image_length)."""
        lanes = [
            SampledLane(self.decoder, text, part, settings, prompt)
            for part in _split(keys, self.decoder.neighbours.size)
        ]
        return torch.cat(_decode(lanes, self.config.image_length), 1)


def _split(keys: Keys, lanes: int) -> list[Keys]:
    """Split candidates into lanes, so that every pipeline stage has work."""
    count = len(keys[0])
    bounds = [count * i // lanes for i in range(lanes + 1)]
    return [[row[a:b] for row in keys] for a, b in pairwise(bounds) if a < b]


def _decode(lanes: "list[SampledLane]", length: int) -> list[Tensor]:
    for position in range(length):
        for lane in lanes:
            lane.advance(position)
    return [lane.finish() for lane in lanes]


def span(prompt: Prompt | None, length: int) -> tuple[int, int]:
    """The first position that is drawn, and one after the last."""
    if prompt is None:
        return 0, length
    drawn = (~prompt.kept).nonzero().flatten().tolist()
    return drawn[0], drawn[-1] + 1


def with_empty(text: Tensor, settings: DrawSettings) -> Tensor:
    """With guidance, append as many empty captions."""
    return text if settings.guidance == 1 else torch.cat([text, torch.full_like(text, PAD)])


def draw_codes(
    decoder: Decoder,
    logits: Tensor,
    keys: Tensor,
    position: int | Tensor,
    settings: DrawSettings,
    canonical: bool = False,
) -> Tensor:
    """Draw a code of each row at a position; in fp32, UNSURE if rounding could have changed it.

    `canonical`: the logits are those of `Decoder.canonical_logits`.
    Shapes: logits (B, codes), keys (B,) int64; a position of all rows, or (B,) int64 -> (B,).
    """
    noise = None
    if settings.temperature != 0:
        noise = gumbel_noise(keys, (decoder.config.image_vocabulary,), position)
    choice = choose(logits, noise, settings, canonical)
    if canonical or not decoder.exact:
        return choice.codes
    return choice.codes.where(choice.sure, UNSURE)


def redraw(
    decoder: Decoder, text: Tensor, image: Tensor, key: Tensor, settings: DrawSettings
) -> Tensor:
    """Draw one candidate's code from canonical logits, which do not depend on its batch.

    Shapes: text (text_length,), image (n,) the codes up to the one that is drawn, key (1,) -> ().
    """
    captions = with_empty(text[None], settings)
    logits = decoder.canonical_logits(captions, image.expand(len(captions), -1))
    drawn = torch.full((1,), UNSURE, device=decoder.device)
    if logits is not None:
        logits = logits if settings.guidance == 1 else guided(logits, settings.guidance)
        drawn = draw_codes(decoder, logits, key, len(image) - 1, settings, canonical=True)
    return decoder.neighbours.share(drawn).wait()[0]


class SampledLane:
    """Candidates that are decoded together."""

    def __init__(
        self,
        decoder: Decoder,
        text: Tensor,
        keys: Keys,
        settings: DrawSettings,
        prompt: Prompt | None,
    ) -> None:
        self._decoder, self._settings = decoder, settings
        length, device = decoder.config.image_length, decoder.device
        self._captions, self._each = len(text), len(keys[0])
        drawn_by = [key_int(*key, "sample") for row in keys for key in row]
        self._keys = torch.tensor(drawn_by, device=device)
        self._text = text.to(device)
        self._codes = torch.zeros(len(self._keys), length, dtype=torch.int64, device=device)
        self._kept = [False] * length
        if prompt is not None:
            rows = (prompt.codes.cpu() * prompt.kept.cpu()).to(device).expand(len(text), -1)
            self._codes[:] = rows.repeat_interleave(self._each, 0)
            self._kept = prompt.kept.tolist()
        self._first, self._end = span(prompt, length)
        self._lane = self._start(self._text, self._codes[:: self._each, : self._first], self._each)
        self._shared: tuple[Shared, int] | None = None

    def advance(self, position: int) -> None:
        """Decode one position of every candidate; a kept position is read, not drawn."""
        if not self._first <= position < self._end:
            return
        self._store_codes()
        logits = self._next(self._lane, position, self._codes)
        if self._kept[position]:
            return
        drawn = torch.full((len(self._keys),), UNSURE, device=self._decoder.device)
        if logits is not None:
            drawn = draw_codes(self._decoder, logits, self._keys, position, self._settings)
        self._shared = self._decoder.neighbours.share(drawn), position

    def finish(self) -> Tensor:
        """(captions, each, image_length)."""
        self._store_codes()
        return self._codes.view(self._captions, self._each, -1)

    def _start(self, text: Tensor, given: Tensor, each: int) -> Lane:
        text = with_empty(text, self._settings)
        return self._decoder.start(text, given.repeat(len(text) // len(given), 1), each)

    def _next(self, lane: Lane, position: int, codes: Tensor) -> Tensor | None:
        before = codes[:, max(position - 1, 0)]
        if self._settings.guidance == 1:
            return self._decoder.next(lane, position, before)
        logits = self._decoder.next(lane, position, before.repeat(2))
        return None if logits is None else guided(logits, self._settings.guidance)

    def _store_codes(self) -> None:
        """Store the last position's codes; redraw those that rounding could change."""
        if self._shared is None:
            return
        (shared, position), self._shared = self._shared, None
        codes = shared.wait()
        self._codes[:, position] = codes
        for row in (codes == UNSURE).nonzero().flatten().tolist():
            self._redraw(row, position)

    def _redraw(self, row: int, position: int) -> None:
        text, image = self._text[row // self._each], self._codes[row, : position + 1]
        key = self._keys[row : row + 1]
        self._codes[row, position] = redraw(self._decoder, text, image, key, self._settings)
