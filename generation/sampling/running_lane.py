"""Rows of a running batch whose caches are decoded in one step, each at an image position."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.config import DrawSettings
from generation.sampling.decoder import Decoder
from generation.sampling.draw import guided
from generation.sampling.kv_cache import Lane
from generation.sampling.pipeline import Shared
from generation.sampling.sampler import UNSURE, draw_codes, redraw, with_empty


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What one step did for one candidate."""

    row: int
    """The number that `RunningBatch.join` returned."""
    position: int
    """The image position whose code is new."""
    codes: Tensor
    """(position + 1,) int64 on the CPU; all codes if the candidate is finished."""
    finished: bool
    """True: the picture is complete, and its row is free."""


@dataclass(kw_only=True, eq=False)
class Row:
    """A candidate that is being decoded."""

    number: int
    places: list[int]
    """Its row in the lane's caches; with guidance also the row of the empty caption."""
    key: int
    settings: DrawSettings
    text: Tensor
    """(text_length,) int64 on the CPU."""
    codes: Tensor
    """(image_length,) int64 on the CPU: kept codes, and those drawn so far."""
    kept: list[bool]
    position: int
    """The next position to decode; all earlier ones are known."""
    end: int
    """One after the last position that is drawn."""
    gone: bool = False
    """True once the candidate has left before its end."""

    @property
    def before(self) -> int:
        """The code one position earlier; 0 at the first position, where it is not read."""
        return int(self.codes[self.position - 1]) if self.position else 0


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step of which the codes have not arrived."""

    rows: list[Row]
    drawing: list[Row]
    """Those whose code is drawn, not kept."""
    shared: Shared | None
    """The codes of `drawing`."""


class RowLane:
    """Rows with caches that are allocated once; candidates join and leave between steps."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self._decoder, self._size = decoder, rows
        self._caches = decoder.caches.lane(rows, 1, decoder.device)
        self._parts: dict[int, Lane] = {}
        """The caches of the first rows, by their number."""
        self._texts: list[list[int] | None] = [None] * rows
        """The captions whose keys and values are in the caches, of free rows as well."""
        self._rows: list[Row] = []
        self._step: _Step | None = None

    def join(self, row: Row) -> None:
        """Fill the caches of a candidate: text and given codes, or a copy of the same text's."""
        device = self._decoder.device
        given = row.codes[None, : row.position].to(device)
        for place, text in zip(row.places, with_empty(row.text[None], row.settings), strict=True):
            words = text.tolist()
            same = [i for i in (place, *range(self._size)) if self._texts[i] == words]
            if row.position == 0 and same:
                self._caches.copy_text(same[0], place)
            else:
                part = self._caches.part(place, place + 1)
                self._decoder.prefill(part, text[None].to(device), given)
            self._texts[place] = words
        self._rows.append(row)

    def leave(self, number: int) -> None:
        """Drop a candidate; a code of it that is on its way is ignored."""
        (row,) = (row for row in self._rows if row.number == number)
        row.gone = True
        self._rows.remove(row)

    def launch(self) -> None:
        """Run one position of every candidate; `store` waits for the codes."""
        if not self._rows:
            return
        decoder, rows = self._decoder, list(self._rows)
        count = 1 + max(place for row in rows for place in row.places)
        count = self._size if decoder.compiled else count
        at, before = [0] * count, [0] * count
        for row in rows:
            for place in row.places:
                at[place], before[place] = row.position, row.before
        logits = decoder.next(
            self._first(count),
            self._tensor(at) if count > 1 else at[0],
            self._tensor(before),
        )
        drawing, shared = [row for row in rows if not row.kept[row.position]], None
        if drawing:
            drawn = torch.full((len(drawing),), UNSURE, device=decoder.device)
            shared = decoder.neighbours.share(
                drawn if logits is None else self._draw(logits, drawing)
            )
        self._step = _Step(rows=rows, drawing=drawing, shared=shared)

    def store(self) -> list[Progress]:
        """Store the codes of the last `launch`; those that rounding could change are redrawn."""
        step, self._step = self._step, None
        if step is None:
            return []
        codes = step.shared.wait().tolist() if step.shared is not None else []
        for row, code in zip(step.drawing, codes, strict=True):
            if not row.gone:
                row.codes[row.position] = code if code != UNSURE else self._redrawn(row)
        return [self._progress(row) for row in step.rows if not row.gone]

    def _first(self, count: int) -> Lane:
        if count not in self._parts:
            self._parts[count] = self._caches.part(0, count)
        return self._parts[count]

    def _progress(self, row: Row) -> Progress:
        row.position += 1
        finished = row.position == row.end
        if finished:
            self._rows.remove(row)
        codes = row.codes if finished else row.codes[: row.position].clone()
        position = row.position - 1
        return Progress(row=row.number, position=position, codes=codes, finished=finished)

    def _draw(self, logits: Tensor, rows: list[Row]) -> Tensor:
        """Draw a code of each of some rows; those with equal settings together."""
        alike: defaultdict[DrawSettings, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            alike[row.settings].append(i)
        drawn = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for settings, numbers in alike.items():
            some = [rows[i] for i in numbers]
            streams = zip(*(row.places for row in some), strict=True)
            own = logits[self._tensor([place for stream in streams for place in stream])]
            own = own if settings.guidance == 1 else guided(own, settings.guidance)
            keys, at = (self._tensor([row.key for row in some]), [row.position for row in some])
            codes = draw_codes(self._decoder, own, keys, self._tensor(at), settings)
            drawn[self._tensor(numbers)] = codes
        return drawn

    def _redrawn(self, row: Row) -> int:
        device, image = self._decoder.device, row.codes[: row.position + 1]
        text, key = row.text.to(device), self._tensor([row.key])
        return int(redraw(self._decoder, text, image.to(device), key, row.settings))

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self._decoder.device)
