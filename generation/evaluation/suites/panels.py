"""The suite panels: image-to-image translation (figure 14 of the paper) as numbers.

The upper half of a held-out picture is the image prompt, and the caption asks for the same figure
below, changed. A drawn picture is exact if its lower panel shows what the operation makes of the
upper one: form, colour, place and style, and nothing else.

Two controls: `swapped` draws with another upper panel and judges by the right one, which must fall
to `chance`: the figure of the lower panels judged by another prompt of the same operation. The
upper bound is the dVAE's reconstruction of the true picture.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InputError
from core.files.atomic import Json, canonical_json, write_atomic
from core.keys import key_int
from core.log import progress
from core.storage.store import open_store
from data_pipeline.formats.raw import RawSource
from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import decode_rgb
from data_pipeline.sources.drawn.panels import (
    CAPTIONS,
    CELLS,
    OPERATIONS,
    Panel,
    blank_below,
    operation_of,
    panel_json,
    panel_of,
    render_pair,
)
from data_pipeline.sources.drawn.read_panels import read_pair
from data_pipeline.streaming.stream import stored_records
from data_pipeline.tokenize.encode import to_bytes
from generation.evaluation.accuracy import derangement, wilson_low
from generation.evaluation.suites.config import PanelsConfig
from generation.evaluation.suites.protocol import Inputs, Measured
from generation.evaluation.suites.record import GALLERY
from generation.sampling.sampler import Prompt
from generation.text_to_image import Studio, picture_buffer, picture_grid
from parallel.device import CPU

SHOWN, SCALE = 12, 2
"""Prompts of each operation whose pictures are written, and their enlargement."""
FEWEST = 2
"""Prompts of an operation that can be swapped."""
TITLE = "Image-to-image translation"
TEXT = (
    "Each column is a held-out prompt: the true picture; the drawn one, whose upper half was "
    "given; and the one drawn with the upper half of another prompt."
)
Readings = list[list[Panel | None]]
"""The lower panel of each candidate of a prompt."""
ATTRIBUTES = ("form", "colour", "row", "column", "style")


class PanelsSuite:
    """Held-out upper panels, each with an operation."""

    def __init__(self, prompts: list[Json], settings: PanelsConfig, out: Path) -> None:
        self.prompts, self.facts, self._settings, self._out = prompts, Json(), settings, out
        self._tops = [panel_of(row["top"]) for row in prompts]
        asked = [operation_of(row["caption"]) for row in prompts]
        self._places = {
            name: [i for i, other in enumerate(asked) if other == name]
            for name in OPERATIONS
            if name in asked
        }
        """Prompts of each operation."""

    def measure(self, studio: Callable[[], Studio]) -> Measured:
        opened = studio()
        opened.tell_cut(list(CAPTIONS.values()))
        opened.tell_guidance(self._settings.draws)
        others = self._swapped()
        swapped_tops = [self._tops[i] for i in others]
        drawn = self._draw(opened, self._tops, "sample")
        swapped = self._draw(opened, swapped_tops, "sample, upper panels swapped")
        true = self._expected_pictures(opened)
        again = to_bytes(opened.decode(opened.encode(_pixels(true))))
        below, below_swapped, above = _lower(drawn), _lower(swapped), _lower(again[:, None])
        rows = [
            judged(
                operation,
                tops=[self._tops[i] for i in places],
                others=[swapped_tops[i] for i in places],
                below=[below[i] for i in places],
                swapped=[below_swapped[i] for i in places],
                again=[above[i] for i in places],
            )
            for operation, places in self._places.items()
        ]
        self._write_gallery(true, drawn, swapped)
        results = {"candidates": self._settings.candidates, "rows": rows}
        return Measured(results=results, headline=_headline(rows))

    def _swapped(self) -> list[int]:
        """For each prompt another one of the same operation, whose upper panel differs."""
        others = list(range(len(self.prompts)))
        for places in self._places.values():
            order = derangement(len(places), self._settings.seed)
            for place, other in zip(places, order, strict=True):
                others[place] = places[other]
        return others

    def _draw(self, studio: Studio, tops: Sequence[Panel], name: str) -> NDArray[np.uint8]:
        """Candidates with these upper panels as image prompts, (prompts, candidates, S, S, 3).

        The lower panel is blank when a prompt is encoded: codes of the upper one that had seen it
        could give it away.
        """
        config, each = studio.sampler.config, self._settings.candidates
        captions = [row["caption"] for row in self.prompts]
        own = [str(top) for top in self._tops]
        blank = np.stack([blank_below(render_pair("same", top, _height(studio))) for top in tops])
        length = config.image_length
        kept = torch.arange(length, device=CPU) < length // 2
        prompt = Prompt(codes=studio.encode(_pixels(blank)), kept=kept)
        pictures = picture_buffer(len(tops), each, blank.shape[1])
        with progress(name, len(tops)) as meter:
            for drawn in studio.codes(captions, self._settings.draws, prompt, own):
                decoded = to_bytes(studio.decode(drawn.codes.flatten(0, 1)))
                part = pictures[drawn.captions, drawn.candidates]
                part[:] = decoded.reshape(part.shape)
                meter.update(drawn.captions.stop)
        return pictures

    def _expected_pictures(self, studio: Studio) -> NDArray[np.uint8]:
        """The true pictures, (prompts, S, S, 3)."""
        pixels = _height(studio)
        asked = {i: name for name, places in self._places.items() for i in places}
        return np.stack([render_pair(asked[i], top, pixels) for i, top in enumerate(self._tops)])

    def _write_gallery(
        self, true: NDArray[Any], drawn: NDArray[Any], swapped: NDArray[Any]
    ) -> None:
        """For each operation a PNG: true pictures, drawn ones, and those of swapped prompts."""
        rows = []
        for operation, places in self._places.items():
            shown = places[:SHOWN]
            name = f"{operation}.png"
            grid = picture_grid([true[shown], drawn[shown, 0], swapped[shown, 0]], SCALE)
            write_atomic(self._out / name, encode_png(grid))
            rows.append({"caption": CAPTIONS[operation], "file": name})
        body = {"title": TITLE, "text": TEXT, "rows": rows}
        write_atomic(self._out / GALLERY, canonical_json(body))


def prepare(inputs: Inputs, settings: PanelsConfig, prompts: list[Json] | None) -> PanelsSuite:
    """Choose held-out pictures of a packed set of panels by key, or take the prompts of a file.

    Raises: InputError if a pair is not one of the panels generator, or an operation has too few.
    """
    if prompts is None:
        prompts = _chosen(inputs.data, settings)
    return PanelsSuite(prompts, settings, inputs.out)


def _chosen(data: str, settings: PanelsConfig) -> list[Json]:
    """Prompts of each operation with different upper panels, by key."""
    records = list(stored_records(RawSource(open_store(data), "validation")))
    records.sort(key=lambda record: (key_int(settings.seed, record.key, "choose"), record.key))
    chosen: dict[str, dict[Panel, Json]] = {name: {} for name in OPERATIONS}
    for record in records:
        rows = chosen[operation_of(record.caption)]
        if len(rows) < settings.per_operation:
            top = read_pair(decode_rgb(record.image, record.key)).top
            if top is None:
                raise InputError(f"{data}: pair {record.key} has no figure in its upper panel")
            row = {"caption": record.caption, "key": record.key, "top": panel_json(top)}
            rows.setdefault(top, row)
    if few := [name for name, rows in chosen.items() if len(rows) < FEWEST]:
        raise InputError(
            f"the validation split of {data} has fewer than {FEWEST} different upper panels for "
            f"{', '.join(few)}; pack more pairs, or give --validation a larger fraction"
        )
    return [row for rows in chosen.values() for row in rows.values()]


def judged(
    operation: str,
    tops: list[Panel],
    others: list[Panel],
    below: Readings,
    swapped: Readings,
    again: Readings,
) -> Json:
    """Figures of one operation, each a share of the candidates.

    Every list has an entry for each prompt: its upper panel, the one that `swapped` was drawn with,
    and the lower panels of its candidates, of its swapped ones and of its reconstruction.
    """
    exact = _share(operation, below, tops)
    return {
        "operation": operation,
        "prompts": len(tops),
        "exact": exact,
        "exact_low95": wilson_low(exact, len(tops)),  # a prompt's candidates are alike
        "swapped": _share(operation, swapped, tops),
        "swapped_follows": _share(operation, swapped, others),
        "chance": _share(operation, below, others),
        "upper_bound": _share(operation, again, tops),
        **{name: _share(operation, below, tops, name) for name in ATTRIBUTES},
    }


def _share(operation: str, below: Readings, tops: list[Panel], attribute: str = "") -> float:
    """Lower panels that are what the operation makes of the upper ones, or in one attribute."""
    right = []
    for top, candidates in zip(tops, below, strict=True):
        expected = OPERATIONS[operation](top)
        for panel in candidates:
            if attribute:
                equal = getattr(panel, attribute, None) == getattr(expected, attribute)
            right.append(equal if attribute else panel == expected)
    return float(np.mean(right))


def _headline(rows: list[Json]) -> dict[str, float]:
    """Means over the operations, then each operation."""
    means = {
        name: float(np.mean([row[name] for row in rows])) for name in ("exact", "swapped", "chance")
    }
    return means | {f"exact, {row['operation']}": row["exact"] for row in rows}


def _height(studio: Studio) -> int:
    """Pixels of a panel's height.

    Raises: InputError if the dVAE's pictures cannot be cut into two panels.
    """
    facts = studio.images.facts
    side = facts.pixels
    if side % (2 * CELLS) or facts.rows % 2:
        raise InputError(
            f"the dVAE has {side} pixels and {facts.rows}x{facts.columns} codes; two panels need a "
            f"multiple of {2 * CELLS} pixels and an even number of rows"
        )
    return side // 2


def _pixels(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def _lower(pictures: NDArray[np.uint8]) -> Readings:
    """The lower panels of (prompts, candidates, S, S, 3)."""
    return [[read_pair(picture).bottom for picture in row] for row in pictures]
