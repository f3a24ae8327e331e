"""`tapir overlap RAW EVAL`: find and leave out pairs whose picture is also in an evaluation set.

A picture's likeness to the evaluation set is the largest cosine of its CLIP embedding with those
of the set. Examples by likeness help to choose the threshold; pairs below it are written as a new
data set. overlap.json also names the evaluation pictures whose likeness to a training pair reaches
the threshold: `tapir score --overlap` leaves them out of a second score.
Source: arXiv 2102.12092, section 3.2: 21% of MS-COCO's validation images are in YFCC100M.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.config import check, to_json
from core.errors import InputError
from core.files.atomic import canonical_json, write_atomic
from core.files.out_folder import refuse_others_folder
from core.log import LOG, progress
from core.storage.store import Store, open_store
from data_pipeline.evaluation_sets import EvaluationSet, open_evaluation
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.crops import encode_png, square
from data_pipeline.images.decode import decode_rgb
from data_pipeline.packing.place import (
    claim,
    close_set,
    finished,
    given_back,
    refuse_empty,
)
from data_pipeline.packing.rejects import REJECTS, Rejects
from data_pipeline.packing.writer import RawWriter
from data_pipeline.sources.pair import Unusable, make_pair
from data_pipeline.streaming.readable import split_readable
from data_pipeline.tokenize.encode import squares_of, to_tensor
from generation.config import OverlapConfig
from generation.text_to_image import picture_grid, to_bytes
from models.clip import Clip
from parallel.mesh import own_mesh
from parallel.precision import set_numerics
from training.export.weights import build_model, open_model

BINS = np.linspace(0.9, 1.0, 11)
EXAMPLES = 6
REPORT = "overlap.json"


@dataclass(kw_only=True)
class Likeness:
    """Histogram of the pairs' likeness to the evaluation set, with examples."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(BINS), np.int64))
    """Pairs from each of BINS up to the next; the last bin is exactly 1."""
    examples: list[list[NDArray[np.uint8]]] = field(default_factory=lambda: [[] for _ in BINS])
    """Some (2, S, S, 3) for each bin: a picture and the nearest one of the evaluation set."""
    pairs: int = 0
    unreadable: int = 0
    """Pairs whose picture does not decode; they are neither compared nor written."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Evaluation pictures that are also in the training split, in `read_overlap`'s format."""

    def note(
        self, likeness: float, picture: NDArray[np.uint8], other: Callable[[], NDArray[np.uint8]]
    ) -> None:
        """Count a pair, and keep it with the other picture as an example if its bin has few."""
        self.pairs += 1
        bin_ = int(np.searchsorted(BINS, likeness + 1e-6, "right")) - 1
        if bin_ < 0:
            return
        self.counts[bin_] += 1
        if len(self.examples[bin_]) < EXAMPLES:
            self.examples[bin_].append(np.stack([picture, other()]))


class _Evaluation:
    """The evaluation set's pictures, embedded."""

    def __init__(self, given: EvaluationSet, clip: Clip, batch: int) -> None:
        self._given, self._clip, self._batch = given, clip, batch
        self.keys = given.pictures
        self.unreadable: list[str] = []
        """Pictures that do not decode; they match nothing."""
        parts = [self.keys[i : i + batch] for i in range(0, len(self.keys), batch)]
        with progress("embed", len(self.keys)) as meter:
            embedded = []
            for part in parts:
                embedded.append(self._embedded_part(part))
                meter.update(len(embedded) * batch)
        if self.unreadable:
            LOG.warning(
                "%d of the evaluation set's %d pictures cannot be decoded, and are compared with "
                "nothing: %s ...",
                *(len(self.unreadable), len(self.keys), self.unreadable[0]),
            )
        self._vectors = np.concatenate(embedded)
        self._best = np.full(len(self.keys), -1.0, np.float32)

    def picture(self, key: str) -> NDArray[np.uint8]:
        """One of its pictures, as CLIP sees it."""
        return square(decode_rgb(self._given.read(key), key), self._clip.config.pixels)

    def _embedded_part(self, keys: list[str]) -> NDArray[np.float32]:
        """Unit vectors of some of its pictures; zeros for those that do not decode."""
        side = self._clip.config.pixels
        pictures = np.zeros((len(keys), side, side, 3), np.uint8)
        readable = np.ones((len(keys), 1), np.float32)
        for place, key in enumerate(keys):
            try:
                pictures[place] = self.picture(key)
            except InputError:
                self.unreadable.append(key)
                readable[place] = 0
        return self._embed(to_tensor(pictures)) * readable

    def embedded(
        self, source: RawSource, left_out: Callable[[RawRecord, InputError], None]
    ) -> Iterator[tuple[list[RawRecord], NDArray[np.uint8], NDArray[np.float32]]]:
        """Batches of pairs with pictures and unit vectors; `left_out` is called for the others."""
        for block in range(len(source.sizes)):
            records = list(source.read(block))
            for i in range(0, len(records), self._batch):
                good, bad = split_readable(records[i : i + self._batch])
                for record, error in bad:
                    left_out(record, error)
                if good:
                    pixels = squares_of([picture for _, picture in good], self._clip.config.pixels)
                    yield [record for record, _ in good], to_bytes(pixels), self._embed(pixels)

    def nearest(
        self, vectors: NDArray[np.float32], training: bool
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Largest cosine of each vector, and its place among the evaluation pictures.

        For pairs of the training split, also update the evaluation pictures' largest cosines.
        """
        cosines = vectors @ self._vectors.T
        if training:
            np.maximum(self._best, cosines.max(0), out=self._best)
        places = cosines.argmax(1)
        return cosines[np.arange(len(vectors)), places], places

    def seen(self, threshold: float) -> dict[str, Any]:
        """Evaluation pictures whose likeness to a training pair reaches the threshold."""
        places = np.flatnonzero(self._best >= threshold).tolist()
        return {
            "fingerprint": self._given.fingerprint,
            "threshold": threshold,
            "data": self._given.name,
            "pictures": len(self.keys),
            "unreadable": len(self.unreadable),
            "overlapping": len(places),
            "share": len(places) / len(self.keys),
            "ids": [self.keys[place] for place in places],
        }

    @torch.no_grad()
    def _embed(self, pixels: Tensor) -> NDArray[np.float32]:
        device = self._clip.log_scale.device
        return np.asarray(self._clip.embed_image(pixels.to(device)).cpu().numpy())


def find_overlap(
    raw: str, evaluation: str, dest: str, clip: Path, out: Path, config: OverlapConfig
) -> dict[str, Any]:
    """Compare a data set with an evaluation set by a run's CLIP; write the other pairs to `dest`.

    Raises: ConfigError with every problem of the settings; InputError if OUT is another's folder.
    """
    check(config.problems())
    refuse_others_folder(out, "overlap")
    ranker = open_model(clip, "clip")
    theirs = open_evaluation(evaluation, SPLITS)
    store = open_store(dest) if dest else None
    model = build_model(ranker).to(own_mesh().world.device)
    assert isinstance(model, Clip)
    summary = remove_overlap(open_store(raw), theirs, store, model, ranker.digest, config)
    return write_likeness(summary, out)


def remove_overlap(
    raw: Store,
    evaluation: EvaluationSet,
    dest: Store | None,
    clip: Clip,
    clip_hash: str,
    config: OverlapConfig,
) -> Likeness:
    """Compare RAW with an evaluation set; with a DEST, write the pairs below the threshold there.

    Pictures are embedded on the device of `clip`.
    Raises: InputError if DEST holds other data, or a split has no pair left.
    """
    set_numerics(clip.log_scale.device, deterministic=False)
    sources = {split: RawSource(raw, split) for split in SPLITS}
    request = {
        "source": "overlap",
        "raw": [source.fingerprint for source in sources.values()],
        "evaluation": evaluation.fingerprint,
        "clip": clip_hash,
        "config": to_json(config),
    }
    if dest is not None:
        claim(dest, request)
        if finished(dest):
            LOG.info("%s already holds this data set; the report is made again", dest.url)
            dest = None
    theirs, summary = _Evaluation(evaluation, clip, config.batch), Likeness()
    if dest is None:
        for split, source in sources.items():
            _compare(split, source, theirs, config, summary)
    else:
        with given_back(dest):
            _write(dest, sources, theirs, config, summary, request)
    summary.evaluation = theirs.seen(config.threshold)
    return summary


def _write(
    dest: Store,
    sources: dict[str, RawSource],
    theirs: "_Evaluation",
    config: OverlapConfig,
    summary: Likeness,
    request: dict[str, Any],
) -> None:
    rejects, shards = Rejects(dest, 1.0), {}
    for split, source in sources.items():
        writer = RawWriter(dest, split, config.shards)
        _compare(split, source, theirs, config, summary, writer, rejects)
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
    split: str,
    source: RawSource,
    theirs: _Evaluation,
    config: OverlapConfig,
    summary: Likeness,
    writer: RawWriter | None = None,
    rejects: Rejects | None = None,
) -> None:
    def left_out(record: RawRecord, error: InputError) -> None:
        summary.unreadable += 1
        if rejects is not None:
            rejects.add(Unusable(key=record.key, kind="image", reason=str(error)))

    with progress("overlap", source.manifest.samples) as meter:
        for records, pictures, vectors in theirs.embedded(source, left_out):
            likeness, places = theirs.nearest(vectors, split == "train")
            for record, picture, value, place in zip(
                records, pictures, likeness.tolist(), places.tolist(), strict=True
            ):
                summary.note(value, picture, partial(theirs.picture, theirs.keys[place]))
                if writer is None or rejects is None:
                    continue
                if value >= config.threshold:
                    reason = f"likeness {value:.4f} to {theirs.keys[place]} of the evaluation set"
                    rejects.add(Unusable(key=record.key, kind="overlap", reason=reason), True)
                else:
                    writer.add(_pair(record), *record.captions)
            meter.update(summary.pairs)


def _pair(record: RawRecord) -> Any:
    suffix = f".{record.extension}"
    return make_pair(record.key, record.image, suffix, record.caption.encode(), record.key)


def write_likeness(summary: Likeness, out: Path) -> dict[str, Any]:
    """Write overlap.json and, for each bin with examples, a picture such as overlap-0.95.png.

    Returns the content of overlap.json without the ids.
    """
    rows = []
    for low, count, examples in zip(BINS.tolist(), summary.counts, summary.examples, strict=True):
        name = ""
        if examples:
            name = f"overlap-{low:.2f}.png"
            upper, lower = (np.stack([pair[i] for pair in examples]) for i in (0, 1))
            write_atomic(out / name, encode_png(picture_grid([upper, lower], 2)))
        rows.append({"likeness_from": round(low, 2), "pairs": int(count), "examples": name})
    if summary.unreadable:
        LOG.warning("%d pairs cannot be decoded and are left out; pack again", summary.unreadable)
    body = {
        "pairs": summary.pairs,
        "unreadable": summary.unreadable,
        "rows": rows,
        "evaluation": summary.evaluation,
    }
    write_atomic(out / REPORT, canonical_json(body))
    short = {name: value for name, value in summary.evaluation.items() if name != "ids"}
    return {**body, "evaluation": short}


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Pictures of an evaluation set that a model was trained on."""

    threshold: float
    """Least likeness at which a picture counts."""
    share: float
    """Fraction of the set's pictures; for a packed set, of both splits."""
    pictures: frozenset[str]
    """Their ids."""


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
