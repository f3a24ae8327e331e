"""overlap.json and its pictures: what `tapir overlap` tells, and what `tapir score` reads of it."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from core.files.atomic import canonical_json, sha256
from core.storage.store import Store
from data_pipeline.evaluation_sets import EvaluationSet
from data_pipeline.images.crops import encode_png
from data_pipeline.jobs.ledger import Record
from generation.text_to_image import picture_grid

BINS = np.linspace(0.9, 1.0, 11)
FLOOR = 0.9 - 1e-5
"""Likeness below which a pair is in no bin."""
EXAMPLES = 6
REPORT = "overlap.json"
Shown = Callable[[int, list[Any]], NDArray[np.uint8]]
"""(number of a task, row of its `near`) -> (2, S, S, 3): a pair's picture and the nearest one."""


def report_of(
    records: list[Record], training: int, evaluation: EvaluationSet, threshold: float
) -> dict[str, Any]:
    """The content of overlap.json, from the records of all tasks; the first `training` are train's.

    `examples` are still [number of the task, row of its `near`].
    """
    pairs = sum(record["pairs"] - len(record["unreadable"]) for record in records)
    near = [(number, row) for number, record in enumerate(records) for row in record["near"]]
    places = np.searchsorted(BINS, [row[2] + 1e-6 for _, row in near], "right") - 1
    rows = []
    for bin_, low in enumerate(BINS.tolist()):
        inside = [each for each, place in zip(near, places.tolist(), strict=True) if place == bin_]
        examples = inside[:EXAMPLES]
        rows.append({"likeness_from": round(low, 2), "pairs": len(inside), "examples": examples})
    return {
        "pairs": pairs,
        "unreadable": sum(len(record["unreadable"]) for record in records),
        "rows": rows,
        "evaluation": _seen(records[:training], evaluation, threshold),
    }


def _seen(records: Iterable[Record], given: EvaluationSet, threshold: float) -> dict[str, Any]:
    """Evaluation pictures whose likeness to a training pair reaches the threshold."""
    records = list(records)
    places = {i for record in records for i, cosine in record["seen"] if cosine >= threshold}
    return {
        "fingerprint": given.fingerprint,
        "threshold": threshold,
        "data": given.name,
        "pictures": len(given.pictures),
        "unreadable": records[0]["evaluation_unreadable"],
        "overlapping": len(places),
        "share": len(places) / len(given.pictures),
        "ids": [given.pictures[place] for place in sorted(places)],
    }


def write_report(store: Store, folder: str, body: dict[str, Any], shown: Shown) -> None:
    """Write a picture such as overlap-0.95.png for each bin with examples, then overlap.json."""
    rows = []
    for row in body["rows"]:
        name = ""
        if row["examples"]:
            name = f"overlap-{row['likeness_from']:.2f}.png"
            pairs = [shown(*example) for example in row["examples"]]
            upper, lower = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
            store.put(folder + name, encode_png(picture_grid([upper, lower], 2)))
        rows.append({**row, "examples": name})
    store.put(folder + REPORT, canonical_json({**body, "rows": rows}))


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Pictures of an evaluation set that a model was trained on."""

    threshold: float
    """Least likeness at which a picture counts."""
    share: float
    """Fraction of the set's pictures; for a packed set, of both splits."""
    pictures: frozenset[str]
    """Their ids."""

    @property
    def digest(self) -> str:
        """Names the scores that leave them out."""
        facts = {**vars(self), "pictures": sorted(self.pictures)}
        return sha256(canonical_json(facts))[:12]


def read_overlap(path: Path, evaluation: EvaluationSet) -> Overlap:
    """Read overlap.json.

    Raises: InputError if there is none, or it is about another evaluation set.
    """
    try:
        body = json.loads(path.read_bytes())["evaluation"]
        overlap = Overlap(
            threshold=float(body["threshold"]),
            share=float(body["share"]),
            pictures=frozenset(body["ids"]),
        )
        other = body["fingerprint"] != evaluation.fingerprint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not an overlap.json ({error!r}); `tapir overlap RAW DATA` writes one"
        ) from error
    if other:
        raise InputError(
            f"{path} is about another evaluation set than {evaluation.name}; "
            "run `tapir overlap RAW DATA` with this one"
        )
    return overlap
