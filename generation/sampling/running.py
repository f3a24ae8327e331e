"""A running batch: candidates join and leave between steps, each at its own image position.

In fp32 a candidate's codes are bitwise those that `Sampler` draws for its key, whatever is decoded
beside it. Rank 0 decides who joins and leaves, and tells it to the other ranks at each step's start
(`Leader.tell`); they run `follow`. Rows are split into as many lanes as there are pipeline stages:
a step returns while all lanes but one are still on their way, so that every stage has work.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from core.config import check
from core.errors import ConfigError
from core.keys import KeyPart, key_int
from generation.config import DrawSettings
from generation.sampling.batches import check_rows, free_memory
from generation.sampling.decoder import Decoder
from generation.sampling.running_lane import Progress, Row, RowLane
from generation.sampling.sampler import Prompt, span
from models.config import PriorConfig
from models.prior import PAD

_CLOSE = [-1]
_FACTS = 7
"""Numbers of a `_Joining` before its text."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One picture to draw."""

    text: Tensor
    """(text_length,) int64, padded with PAD."""
    key: tuple[KeyPart, ...]
    """Random key: `(seed, caption, number)` gives the picture of `tapir sample`."""
    settings: DrawSettings
    """Temperature, top-k, top-p and guidance; its `candidates` and `seed` are not read."""
    prompt: Prompt | None = None
    """Codes and kept are (image_length,)."""

    def problems(self, config: PriorConfig) -> list[str]:
        """What the prior cannot draw."""
        problems, length = self.settings.problems(), config.image_length
        if self.text.shape != (config.text_length,):
            problems.append(f"text must have {config.text_length} tokens, padded with {PAD}")
        elif not bool(((self.text >= PAD) & (self.text < config.text_vocabulary)).all()):
            problems.append(f"text tokens must be {PAD} to {config.text_vocabulary - 1}")
        if self.prompt is None:
            return problems
        codes, kept = self.prompt.codes, self.prompt.kept
        if codes.shape != (length,) or kept.shape != (length,):
            problems.append(f"a prompt must have {length} codes, and say of each if it is kept")
        elif bool(kept.all()):
            problems.append("the prompt keeps all codes: nothing would be drawn")
        elif not bool(((codes >= 0) & (codes < config.image_vocabulary))[kept].all()):
            problems.append(f"kept codes must be 0 to {config.image_vocabulary - 1}")
        return problems


class RunningBatch:
    """Decodes candidates in a fixed number of rows; to be used from one thread.

    On a mesh every rank creates one with the same `rows`; rank 0 calls all methods but `follow`,
    and calls `step` at least once a minute, also without candidates: other ranks wait for it, at
    most as long as their process group allows.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        free: Callable[[torch.device], int] = free_memory,
    ) -> None:
        """Allocate all caches; nothing grows later.

        `free`: bytes that this rank may take for decoding on a device.
        Raises: ConfigError if the caches of `rows` do not fit into free memory on every rank.
        """
        check(["rows must be at least 1"] if rows < 1 else [])
        self.decoder, self.config, self.rows = decoder, decoder.config, rows
        check_rows(decoder.caches, rows, free(decoder.device), decoder.device, decoder.least)
        count = max(1, min(decoder.neighbours.size, rows // 2))  # guidance takes two rows of one
        self._bounds = [rows * i // count for i in range(count + 1)]
        self._lanes = [RowLane(decoder, b - a) for a, b in pairwise(self._bounds)]
        self._unused = [set(range(b - a)) for a, b in pairwise(self._bounds)]
        self._held: dict[int, list[int]] = {}
        self._leaving: list[int] = []
        self._joining: dict[int, list[int]] = {}

    @property
    def free(self) -> int:
        """Rows that are free now; on rank 0. A candidate takes one, with guidance two."""
        return sum(map(len, self._unused))

    def fits(self, settings: DrawSettings) -> bool:
        """Say whether a candidate could join now; two rows of guidance must be in one lane."""
        return max(map(len, self._unused)) >= _streams(settings)

    def join(self, candidate: Candidate) -> int:
        """Take rows for a candidate, which is decoded from the next step on; returns its number.

        A number is given again after its candidate has finished or left. On rank 0.
        Raises: ConfigError with every problem of the candidate, or if no row is free (`fits`).
        """
        check(candidate.problems(self.config))
        streams = _streams(candidate.settings)
        if not self.fits(candidate.settings):
            raise ConfigError(
                f"{self.free} of {self.rows} rows are free, and this candidate takes {streams} of "
                f"one lane ({self._bounds[1]} rows): wait for others, or start with more rows"
            )
        lane = max(range(len(self._lanes)), key=lambda i: len(self._unused[i]))
        places = sorted(self._unused[lane])[:streams]
        self._unused[lane] -= set(places)
        numbers = [self._bounds[lane] + place for place in places]
        self._held[numbers[0]] = numbers
        self._joining[numbers[0]] = _packed(candidate, numbers, self.config.image_length)
        return numbers[0]

    def leave(self, row: int) -> None:
        """Cancel a candidate that has not finished; its rows are free at once. On rank 0.

        Raises: ConfigError if the row has no candidate.
        """
        if row not in self._held:
            raise ConfigError(f"row {row} has no candidate: it has finished or left")
        if self._joining.pop(row, None) is None:
            self._leaving.append(row)
        self._release(row)

    def step(self) -> list[Progress]:
        """Decode one position of every candidate; returns what became known, at most one a row.

        With pipeline stages a candidate's first code comes one step late. On rank 0.
        """
        joining = [number for packed in self._joining.values() for number in packed]
        words = [len(self._leaving), *self._leaving, *joining]
        self._leaving, self._joining = [], {}
        progress = self._advance(self.decoder.lead.tell(words if any(words) else []))
        for each in progress:
            if each.finished:
                self._release(each.row)
        return progress

    def follow(self) -> None:
        """Decode what rank 0 decides until it calls `close`; on the other ranks."""
        while (words := self.decoder.lead.tell([])) != _CLOSE:
            self._advance(words)

    def close(self) -> None:
        """End `follow` on the other ranks; on rank 0, once, after its last step."""
        self.decoder.lead.tell(_CLOSE)

    def _advance(self, words: list[int]) -> list[Progress]:
        if words:
            leaving, joining = words[1 : words[0] + 1], words[words[0] + 1 :]
            for number in leaving:
                self._lanes[self._lane_of(number)].leave(number)
            width = _FACTS + self.config.text_length + 2 * self.config.image_length
            for first in range(0, len(joining), width):
                self._enter(joining[first : first + width])
        progress, count = [], len(self._lanes)
        for i, lane in enumerate(self._lanes):
            lane.launch()
            progress += self._lanes[(i + 1) % count].store()
        return progress

    def _enter(self, packed: list[int]) -> None:
        row = _unpacked(packed, self.config)
        lane = self._lane_of(row.number)
        row.places = [number - self._bounds[lane] for number in row.places]
        self._lanes[lane].join(row)

    def _lane_of(self, number: int) -> int:
        return next(i for i, end in enumerate(self._bounds[1:]) if number < end)

    def _release(self, row: int) -> None:
        lane = self._lane_of(row)
        self._unused[lane] |= {number - self._bounds[lane] for number in self._held.pop(row)}


def _streams(settings: DrawSettings) -> int:
    return 1 if settings.guidance == 1 else 2


def _packed(candidate: Candidate, numbers: list[int], length: int) -> list[int]:
    """A candidate as integers: rows, key, settings, text, codes, kept."""
    settings, prompt = candidate.settings, candidate.prompt
    kept = [0] * length if prompt is None else prompt.kept.int().tolist()
    codes = [0] * length if prompt is None else (prompt.codes * prompt.kept).tolist()
    return [
        numbers[0],
        numbers[-1],
        key_int(*candidate.key, "sample"),
        settings.top_k,
        *(_bits(x) for x in (settings.temperature, settings.top_p, settings.guidance)),
        *(candidate.text.tolist() + codes + kept),
    ]


def _unpacked(packed: list[int], config: PriorConfig) -> Row:
    """The row of `_packed`; its `places` are still numbers of the whole batch."""
    first, second, key, top_k, *bits = packed[:_FACTS]
    temperature, top_p, guidance = map(_float, bits)
    ends = _FACTS + config.text_length, _FACTS + config.text_length + config.image_length
    text, codes = (
        torch.tensor(part, device="cpu")
        for part in (packed[_FACTS : ends[0]], packed[slice(*ends)])
    )
    kept = [bool(x) for x in packed[ends[1] :]]
    prompt = Prompt(codes=codes, kept=torch.tensor(kept, device="cpu"))
    position, end = span(prompt, config.image_length)
    return Row(
        number=first,
        places=[first] if first == second else [first, second],
        key=key,
        settings=DrawSettings(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance),
        text=text,
        codes=codes,
        kept=kept,
        position=position,
        end=end,
    )


def _bits(value: float) -> int:
    """The int64 with the same bits as a float64."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
