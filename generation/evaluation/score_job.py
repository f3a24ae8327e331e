"""`tapir score DATA`: FID and IS of drawn pictures, by blocks, on any number of workers.

    OUT/request.json                           captions, models, settings; OUT takes no others
    OUT/pictures/000012.tar                    a block's best pictures as PNG, with their captions
    OUT/features-HASH/drawn-000012.safetensors their features and logits at every radius
    OUT/features-HASH/real-000003.safetensors  features of a block of real pictures
    OUT/features-HASH/scores-REQUEST.json      the scores, also with another overlap
    OUT/features-HASH/_done/, OUT/job.json     those of every job (data_pipeline/jobs/worker.py)
    OUT/scores.json                            the scores that were asked for last

HASH covers the network and the radii: if they change, the pictures already drawn are scored again.
Files depend on their block alone, and sums are taken in the order of the blocks. So workers may be
killed and restarted, also in another number: on CPUs of one kind the scores are bitwise equal.
"""

import functools
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.config import to_json
from core.errors import CorruptError, InputError
from core.files.atomic import Json, canonical_json, sha256
from core.log import LOG
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.evaluation_sets import EvaluationSet
from data_pipeline.formats.manifest import read_json
from data_pipeline.formats.raw import parse_pairs
from data_pipeline.formats.shards import build_tar
from data_pipeline.images.crops import encode_png, square
from data_pipeline.images.decode import decode_rgb
from data_pipeline.jobs.leases import SECONDS
from data_pipeline.jobs.ledger import Record
from data_pipeline.jobs.worker import Job, Progress, Task, Work
from generation.config import ScoreConfig
from generation.evaluation.blocks import Blocks, BlockTask
from generation.evaluation.feature_extractors import Network, blurred
from generation.evaluation.overlap_report import Overlap
from generation.evaluation.score_rows import (
    DRAWN,
    READABLE,
    REAL,
    Masks,
    features,
    logits,
    score_row,
)
from generation.text_to_image import Candidates, Studio
from models.critics.fid import SPLITS
from parallel.precision import Numerics

REQUEST, SCORES, PICTURES = "request.json", "scores.json", "pictures"
ALL, WITHOUT = "all", "without overlap"
FEW = 100 * SPLITS
"""Captions below which an IS says little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTask(Task):
    """One block of pictures."""

    block: BlockTask


class ScoreJob:
    """The blocks of a score, as one worker sees them."""

    def __init__(
        self,
        evaluation: EvaluationSet,
        models: dict[str, str],
        pixels: int,
        network: Network,
        config: ScoreConfig,
        out: Path,
        numerics: Numerics,
        overlap: Overlap | None = None,
    ) -> None:
        self._evaluation, self._models, self._pixels = evaluation, models, pixels
        self._network, self._config, self._out = network, config, out
        self._numerics, self._overlap = numerics, overlap
        self._captions = evaluation.choose(config.captions, config.seed)
        self._pictures = evaluation.pictures_of(self._captions)
        facts = {"network": network.name, "radii": to_json(config.radii)}
        self._prefix = f"features-{sha256(canonical_json(facts))[:12]}/"
        self._store = FolderStore(out)
        self._blocks = Blocks(
            folder=out / self._prefix,
            size=config.block,
            rows={DRAWN: len(self._captions), REAL: len(self._pictures)},
        )
        self._masks = self._sets(np.ones(len(self._pictures), bool))

    @property
    def prompts(self) -> list[Json]:
        """The captions, each with the pictures that it is compared with."""
        return [{"caption": c.text, "pictures": list(c.pictures)} for c in self._captions]

    @property
    def proxy(self) -> bool:
        """True if the network is a proxy."""
        return self._network.proxy

    @property
    def facts(self) -> Json:
        """What decides the scores besides captions, models and settings."""
        facts: Json = {"data": self._evaluation.fingerprint, "network": self._network.name}
        return facts | ({"overlap": self._overlap.digest} if self._overlap else {})

    def run(self, studio: Callable[[], Studio], member: JobWorker) -> dict[str, Any]:
        """Do blocks until all are done, by any worker; return the scores.

        Raises: InputError if OUT holds blocks of another request.
        """
        self._claim()
        opened = functools.cache(functools.partial(self._opened, studio))
        tasks = [self._task(block) for block in self._blocks.tasks]
        job = Job(self._store, tasks, member, SECONDS)
        result = f"{self._prefix}scores-{self._overlap.digest if self._overlap else 'all'}.json"
        finisher = job.finisher(self._prefix, result, lambda: self._write(result, tasks))
        job.announce("score", [finisher])
        job.run(Work(make=lambda task, progress: self._make(task, progress, opened)), [finisher])
        scores = self._store.get(result)
        self._store.put(SCORES, scores)
        body: dict[str, Any] = json.loads(scores)
        return body

    def _task(self, block: BlockTask) -> ScoreTask:
        name, part = self._blocks.name(block), self._blocks.part(block[1])
        size = len(range(self._blocks.rows[block[0]])[part])
        return ScoreTask(prefix=self._prefix, name=name, shown=name, size=size, block=block)

    def _make(self, task: ScoreTask, progress: Progress, studio: Callable[[], Studio]) -> Record:
        if not self._blocks.exists(task.block):
            self._do(task.block, studio)
        progress["pairs"] = task.size
        return {"pairs": task.size}

    def _write(self, result: str, tasks: list[ScoreTask]) -> bool:
        """Write the scores; blocks that somebody has deleted are made again first."""
        lost = [task for task in tasks if not self._blocks.exists(task.block)]
        for task in lost:
            self._store.delete(task.marker)
        if not lost:
            self._store.put(result, canonical_json(self._scores()))
        return not lost

    def _opened(self, studio: Callable[[], Studio]) -> Studio:
        opened = studio()
        opened.tell_cut([caption.text for caption in self._captions])
        return opened

    def _claim(self) -> None:
        """Store this request in OUT, or check that OUT holds the same one."""
        free = {"radii"} if self._config.precision == "bf16" else {"radii", "batch"}
        sampling = {name: v for name, v in to_json(self._config).items() if name not in free}
        request = {
            **self._models,
            **sampling,
            "data": self._evaluation.fingerprint,
            "pixels": self._pixels,
            "captions": len(self._captions),
        }
        if self._store.put(REQUEST, canonical_json(request), if_absent=True):
            return
        try:
            stored = read_json(self._store, REQUEST)
        except CorruptError as error:
            raise InputError(
                f"{self._out / REQUEST} is damaged; if the settings are still the same, "
                "delete it, and the same command goes on; else give another --out"
            ) from error
        names = sorted(n for n in {*stored, *request} if stored.get(n) != request.get(n))
        if names:
            raise InputError(
                f"{self._out} holds scores with other {', '.join(names)} "
                f"(of {names[0]}: {stored.get(names[0])}, now {request.get(names[0])}); "
                "give another --out, or the earlier settings"
            )

    def _sets(self, readable: NDArray[np.bool_]) -> dict[str, Masks]:
        """Masks of the captions and the readable pictures of each set of rows."""
        captions, pictures = self._captions, self._pictures
        sets = {ALL: {DRAWN: np.ones(len(captions), bool), REAL: readable}}
        if self._overlap is not None:
            seen = self._overlap.pictures
            kept = [not seen.intersection(caption.pictures) for caption in captions]
            left = set(
                self._evaluation.pictures_of(c for c, k in zip(captions, kept, strict=True) if k)
            )
            sets[WITHOUT] = {
                DRAWN: np.array(kept, bool),
                REAL: readable & np.array([name in left for name in pictures], bool),
            }
        for name, masks in sets.items():
            if min(mask.sum() for mask in masks.values()) < 2:
                raise InputError(
                    f"there are fewer than two captions or pictures ({name}) in "
                    f"{self._evaluation.name}; a FID needs more"
                )
        return sets

    def _do(self, task: BlockTask, studio: Callable[[], Studio]) -> None:
        kind, block = task
        arrays: dict[str, NDArray[np.float32]] = {}
        if kind == DRAWN:
            pictures = self._drawn(block, studio)
        else:
            pictures, arrays[READABLE] = self._real(block)
        for radius in self._config.radii:
            seen, classes = self._network(blurred(pictures, radius))
            arrays[features(radius)] = seen
            if kind == DRAWN:
                arrays[logits(radius)] = classes
        self._blocks.write(task, arrays)

    def _real(self, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """A block's real pictures, and which of them decode; the others are black."""
        names, read = self._pictures[self._blocks.part(block)], self._evaluation.read
        pictures = np.zeros((len(names), self._pixels, self._pixels, 3), np.uint8)
        readable = np.ones(len(names), np.float32)
        for place, name in enumerate(names):
            try:
                image = decode_rgb(read(name), f"{name} of {self._evaluation.name}")
                pictures[place] = square(image, self._pixels)
            except InputError as error:
                LOG.warning("%s; the scores are made without it", error)
                readable[place] = 0
        return pictures, readable

    def _drawn(self, block: int, studio: Callable[[], Studio]) -> NDArray[np.uint8]:
        """A block's pictures from its tar; draw and write the tar first if it does not exist."""
        name, part = f"{PICTURES}/{block:06d}.tar", self._blocks.part(block)
        captions = self._captions[part]
        if not self._store.exists(name):
            best = studio().draw([caption.text for caption in captions], self._config.draws)
            self._store.put(name, _tar(best, part.start), if_absent=True)
        try:
            records = parse_pairs(self._store.get(name))
            if len(records) != len(captions):
                raise InputError(f"it has {len(records)} pictures, not {len(captions)}")
            return np.stack([decode_rgb(r.image, r.key) for r in records])
        except (InputError, tarfile.TarError, ValueError, KeyError) as error:
            raise CorruptError(
                f"{self._out / name} is damaged ({error}); delete it, and the same command makes "
                "it again"
            ) from error

    def _scores(self) -> dict[str, Any]:
        pictures = len(self._pictures)
        readable = self._blocks.read_if_there(REAL, READABLE, pictures) > 0
        self._masks = self._sets(readable)
        rows = [
            {"set": name, **score_row(self._blocks, masks, radius)}
            for name, masks in self._masks.items()
            for radius in self._config.radii
        ]
        _, first = next(self._blocks.read(REAL, features(self._config.radii[0])))
        least = min(min(row["captions"], row["pictures"]) for row in rows)
        if least <= first.shape[1]:
            LOG.warning(
                "%d pictures are few for %d features, and such a FID is too high: compare it only "
                "with those of as many pictures",
                *(least, first.shape[1]),
            )
        if least < FEW:
            LOG.warning(
                "%d captions are few for an IS, which is the mean over %d parts of them: it is too "
                "low",
                *(least, SPLITS),
            )
        scores = {
            "label": self._network.label,
            "network": self._network.name,
            "data": self._evaluation.name,
            "captions": len(self._captions),
            "pictures": pictures,
            "pictures_unreadable": int((~readable).sum()),
            "candidates": self._config.candidates,
            "numerics": to_json(self._numerics),
            "rows": rows,
        }
        if self._overlap is not None:
            kept = self._masks[WITHOUT]
            scores["overlap"] = {
                "threshold": self._overlap.threshold,
                "share": self._overlap.share,
                "captions_left_out": int((~kept[DRAWN]).sum()),
                "pictures_left_out": int((readable & ~kept[REAL]).sum()),
            }
        return scores


def _tar(rows: list[Candidates], first: int) -> bytes:
    """The best picture of each caption, as WebDataset members."""
    return build_tar(
        [
            {
                "__key__": f"{first + i:06d}",
                "png": encode_png(row.pictures[0]),
                "txt": row.caption.encode(),
                "json": canonical_json({"score": float(row.scores[0])}),
            }
            for i, row in enumerate(rows)
        ]
    )
