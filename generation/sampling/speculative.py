"""Speculative decoding: a pass decodes several positions of a candidate, with guesses as context.

A code is the argmax of its logits plus noise that its key and position alone decide, so that a
guess is right if it is that code, whatever made it. The first position of a pass has a known
context; so has each that follows right guesses. The others are guesses of the next pass: they were
drawn with their own noise from a context that is partly right. In fp32 the codes are those of
plain decoding, bit for bit.
Source: arXiv 2410.01699 (Jacobi iteration as its own draft), with the noise of a position kept
between passes, as arXiv 2408.07978 shares it between draft and target.
"""

import torch
from torch import Tensor

from generation.config import DrawSettings
from generation.sampling.decoder import Decoder
from generation.sampling.draw import Choice, choose, guided
from generation.sampling.sampler import Keys, Prompt, SampledLane, Sampler
from models.keyed_noise import gumbel_noise


class SpeculativeSampler(Sampler):
    """A sampler whose decoder has `together` > 1; not for a pipeline's stages."""

    passes, decoded = 0, 0
    """Passes of a candidate so far, and codes that they drew."""

    def _decoded(
        self, text: Tensor, keys: Keys, settings: DrawSettings, prompt: Prompt | None
    ) -> Tensor:
        rows = SpeculativeLane(self.decoder, text, keys, settings, prompt)
        while rows.unfinished:
            rows.advance_all()
        self.passes += rows.passes
        self.decoded += rows.decoded
        return rows.finish()


class SpeculativeLane(SampledLane):
    """Candidates that are decoded together, each at positions of its own."""

    def __init__(
        self,
        decoder: Decoder,
        text: Tensor,
        keys: Keys,
        settings: DrawSettings,
        prompt: Prompt | None,
    ) -> None:
        super().__init__(decoder, text, keys, settings, prompt)
        config, device = decoder.config, decoder.device
        self._length, self._vocabulary = config.image_length, config.image_vocabulary
        self._together = min(decoder.caches.together, self._length)
        self._offsets = torch.arange(self._together, device=device)
        self._all_kept = torch.tensor(self._kept, device=device)
        self._known = torch.full_like(self._keys, self._first)
        """Positions before it have their codes; from it on codes are guesses."""
        self._noise = torch.zeros(
            len(self._keys), 2 * self._together, self._vocabulary, device=device
        )
        """That of position p is at p modulo its length."""
        self._noised = self._known.clone()
        self.passes = self.decoded = 0

    @property
    def unfinished(self) -> int:
        """Candidates that still have unknown codes."""
        return int((self._known < self._end).sum())

    def advance_all(self) -> None:
        """Decode the next positions of every candidate."""
        self.passes += self.unfinished
        first = self._known.clamp(max=self._length - self._together)
        at = first[:, None] + self._offsets
        logits = self._logits(at)
        choice = self._choose(logits.flatten(0, 1), at)
        drawn, sure = choice.codes.view_as(at), choice.sure.view_as(at) | (not self._decoder.exact)
        guesses = self._codes.gather(1, at)
        given = self._all_kept[at] | (at < self._known[:, None])
        right = given | (drawn == guesses) & sure
        accepted = right.long().cumprod(1).sum(1)
        self._codes.scatter_(1, at, guesses.where(given, drawn))
        wrong = accepted < self._together
        corrected = accepted.clamp(max=self._together - 1)[:, None]
        doubtful = wrong & ~sure.gather(1, corrected)[:, 0]
        for row in doubtful.nonzero().flatten().tolist():
            self._redraw(row, int(at[row, corrected[row]]))
        known = (first + accepted + wrong).clamp(max=self._end)
        self.decoded += int((known - self._known).sum())
        self._known = known
        self._guess_further(logits[:, -1], first + self._together)

    def _logits(self, at: Tensor) -> Tensor:
        """(rows, n, codes) at positions (rows, n)."""
        before = self._codes.gather(1, (at - 1).clamp_min(0))
        guides = 1 if self._settings.guidance == 1 else 2
        logits = self._decoder.next(self._lane, at.repeat(guides, 1), before.repeat(guides, 1))
        assert logits is not None
        if guides > 1:
            logits = guided(logits, self._settings.guidance)
        return logits.view(*at.shape, -1)

    def _choose(self, logits: Tensor, at: Tensor) -> Choice:
        """Draw a code from each row of logits, (rows * n, codes), at positions (rows, n)."""
        if self._settings.temperature == 0:
            return choose(logits, None, self._settings)
        self._draw_noise(at[:, -1])
        rows = torch.arange(len(at), device=at.device)[:, None]
        noise = self._noise[rows, at % self._noise.shape[1]].flatten(0, 1)
        return choose(logits, noise, self._settings)

    def _draw_noise(self, last: Tensor) -> None:
        """Draw the noise of all positions up to the last one of each row."""
        ahead = torch.arange(self._noise.shape[1], device=last.device)
        positions = self._noised[:, None] + ahead
        missing = positions <= last[:, None]
        rows, positions = missing.nonzero()[:, 0], positions[missing]
        noise = gumbel_noise(self._keys[rows], (self._vocabulary,), positions)
        self._noise[rows, positions % self._noise.shape[1]] = noise
        self._noised = torch.maximum(self._noised, last + 1)

    def _guess_further(self, logits: Tensor, first: Tensor) -> None:
        """Guess the codes that the next pass reads from a position of each row on.

        Shapes: logits (rows, codes) of the position before `first`, (rows,).
        """
        count = int((self._known + self._together - first).max())
        at = first[:, None] + self._offsets[:count]
        inside = at.clamp(max=self._length - 1)
        codes = self._choose(logits.repeat_interleave(count, 0), inside).codes.view_as(at)
        new = (at < self._length) & ~self._all_kept[inside]
        rows = new.nonzero()[:, 0]
        self._codes[rows, at[new]] = codes[new]
