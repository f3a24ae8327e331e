"""`tapir overlap RAW EVAL`: pairs whose picture an evaluation set has, too, found and left out.

A picture's likeness to the evaluation set is the cosine of its CLIP embedding with the nearest one
there. Examples at rising likeness show where the threshold belongs; with one, the other pairs are
written as a data set of their own.
Source: arXiv 2102.12092, section 3.2: 21% of MS-COCO's validation images were found in YFCC100M.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.files import canonical_json, write_atomic
from core.log import LOG, progress
from core.settings import to_json
from core.store import Store
from data_pipeline.images import encode_png
from data_pipeline.manifest import SPLITS
from data_pipeline.pack import (
    REJECTS,
    RawWriter,
    Rejects,
    claim,
    close_set,
    finished,
    given_back,
    refuse_empty,
)
from data_pipeline.raw import RawRecord, RawSource
from data_pipeline.sources.files import make_pair
from data_pipeline.sources.pair import Unusable
from data_pipeline.tokenize.encode import pictures_of
from generation.config import OverlapConfig
from generation.pictures import picture_grid, to_bytes
from models.clip import Clip

BINS = np.linspace(0.9, 1.0, 11)
EXAMPLES = 6
REPORT = "overlap.json"


@dataclass(kw_only=True)
class Likeness:
    """How like the evaluation set the pairs are."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(BINS), np.int64))
    """Pairs from each of BINS up to the next; the last is 1 itself."""
    examples: list[list[NDArray[np.uint8]]] = field(default_factory=lambda: [[] for _ in BINS])
    """(2, S, S, 3): a picture beside the nearest of the evaluation set, some for each bin."""
    pairs: int = 0

    def note(self, likeness: float, picture: NDArray[np.uint8], other: NDArray[np.uint8]) -> None:
        """Count a pair, and keep it as an example if its bin has few."""
        self.pairs += 1
        bin_ = int(np.searchsorted(BINS, likeness + 1e-6, "right")) - 1
        if bin_ < 0:
            return
        self.counts[bin_] += 1
        if len(self.examples[bin_]) < EXAMPLES:
            self.examples[bin_].append(np.stack([picture, other]))


class _Evaluation:
    """The evaluation set's pictures, embedded."""

    def __init__(self, store: Store, clip: Clip, batch: int) -> None:
        self._clip, self._pixels, self._batch = clip, clip.config.pixels, batch
        sources = [RawSource(store, split) for split in SPLITS]
        self.keys: list[str] = []
        embedded, pictures = [], []
        for records, shown, vectors in self.embedded(sources):
            self.keys += [record.key for record in records]
            embedded.append(vectors)
            pictures.append(shown)
        self._vectors, self.pictures = np.concatenate(embedded), np.concatenate(pictures)

    def embedded(
        self, sources: list[RawSource]
    ) -> Iterator[tuple[list[RawRecord], NDArray[np.uint8], NDArray[np.float32]]]:
        """Batches of pairs with their pictures and unit vectors."""
        for source in sources:
            for block in range(len(source.sizes)):
                records = list(source.read(block))
                for i in range(0, len(records), self._batch):
                    part = records[i : i + self._batch]
                    pixels = pictures_of(part, self._pixels)
                    with torch.no_grad():
                        vectors = self._clip.embed_image(pixels).numpy()
                    yield part, to_bytes(pixels), vectors

    def nearest(self, vectors: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        """For each vector the largest cosine and where it is."""
        cosines = vectors @ self._vectors.T
        places = cosines.argmax(1)
        return cosines[np.arange(len(vectors)), places], places


def remove_overlap(
    raw: Store,
    evaluation: Store,
    dest: Store | None,
    clip: Clip,
    clip_hash: str,
    config: OverlapConfig,
) -> Likeness:
    """Compare RAW with an evaluation set; with a DEST, write the pairs below the threshold there.

    Raises: InputError if DEST holds other data, or no pair is left of a split.
    """
    sources = {split: RawSource(raw, split) for split in SPLITS}
    request = {
        "source": "overlap",
        "raw": [source.fingerprint for source in sources.values()],
        "evaluation": [RawSource(evaluation, split).fingerprint for split in SPLITS],
        "clip": clip_hash,
        "config": to_json(config),
    }
    if dest is not None:
        claim(dest, request)
        if finished(dest):
            LOG.info("%s already holds this data set; the report is made again", dest.url)
            dest = None
    theirs, found = _Evaluation(evaluation, clip, config.batch), Likeness()
    if dest is None:
        for source in sources.values():
            _compare(source, theirs, config, found, None, None)
        return found
    with given_back(dest):
        _write(dest, sources, theirs, config, found, request)
    return found


def _write(
    dest: Store,
    sources: dict[str, RawSource],
    theirs: "_Evaluation",
    config: OverlapConfig,
    found: Likeness,
    request: dict[str, Any],
) -> None:
    rejects, shards = Rejects(dest, 1.0), {}
    for split, source in sources.items():
        writer = RawWriter(dest, split, config.shards)
        _compare(source, theirs, config, found, writer, rejects)
        writer.flush()
        shards[split] = writer.shards
    refuse_empty(shards, "raise the threshold")
    rejects.flush()
    facts = {
        split: {**source.manifest.facts, "overlap": request} for split, source in sources.items()
    }
    close_set(dest, shards, facts, rejects)
    LOG.info("%s; each with its reason in %s/%s", dict(rejects.kinds), dest.url, REJECTS)


def _compare(
    source: RawSource,
    theirs: _Evaluation,
    config: OverlapConfig,
    found: Likeness,
    writer: RawWriter | None,
    rejects: Rejects | None,
) -> None:
    with progress("overlap", source.manifest.samples) as meter:
        for records, pictures, vectors in theirs.embedded([source]):
            likeness, places = theirs.nearest(vectors)
            for record, picture, value, place in zip(
                records, pictures, likeness.tolist(), places.tolist(), strict=True
            ):
                found.note(value, picture, theirs.pictures[place])
                if writer is None or rejects is None:
                    continue
                if value >= config.threshold:
                    reason = f"likeness {value:.4f} to {theirs.keys[place]} of the evaluation set"
                    rejects.add(Unusable(key=record.key, kind="overlap", reason=reason), True)
                else:
                    writer.add(_pair(record), record.caption)
            meter.update(found.pairs)


def _pair(record: RawRecord) -> Any:
    suffix = f".{record.extension}"
    return make_pair(record.key, record.image, suffix, record.caption.encode(), record.key)


def write_likeness(found: Likeness, out: Path) -> dict[str, Any]:
    """Write overlap.json and, for each bin that has any, overlap-0.95.png of example pairs."""
    rows = []
    for low, count, examples in zip(BINS.tolist(), found.counts, found.examples, strict=True):
        name = ""
        if examples:
            name = f"overlap-{low:.2f}.png"
            upper, lower = (np.stack([pair[i] for pair in examples]) for i in (0, 1))
            write_atomic(out / name, encode_png(picture_grid([upper, lower], 2)))
        rows.append({"likeness_from": round(low, 2), "pairs": int(count), "examples": name})
    body = {"pairs": found.pairs, "rows": rows}
    write_atomic(out / REPORT, canonical_json(body))
    return body
