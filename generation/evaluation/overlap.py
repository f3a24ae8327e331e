"""`tapir overlap RAW EVAL`: find and leave out pairs whose picture is also in an evaluation set.

    OUT/likeness/_done/<task>.json              the near pairs of a raw shard (likeness.py)
    OUT/likeness/<request>/overlap.json, *.png  the report for a threshold
    OUT/overlap.json, *.png                     the report that was asked for last

A picture's likeness to the evaluation set is the largest cosine of its CLIP embedding with those
of the set. Examples by likeness help to choose the threshold; pairs below it become a view of RAW,
a data set that copies nothing: another threshold embeds nothing again. overlap.json also names the
evaluation pictures whose likeness to a training pair reaches the threshold: `tapir score --overlap`
leaves them out of a second score.
Source: arXiv 2102.12092, section 3.2: 21% of MS-COCO's validation images are in YFCC100M.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.config import check, to_json
from core.errors import InputError
from core.files.atomic import canonical_json, sha256
from core.files.out_folder import refuse_others_folder
from core.log import LOG
from core.storage.store import FolderStore, Store, open_store
from core.workers import JobWorker, job_worker_of
from data_pipeline.catalogue.parts import FACT as CATALOGUE
from data_pipeline.evaluation_sets import EvaluationSet, open_evaluation
from data_pipeline.formats.manifest import NAME, SPLITS
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.raw_set import Base, write_view
from data_pipeline.formats.raw_shards import RawShards
from data_pipeline.formats.views.masks import Kept
from data_pipeline.images.crops import square
from data_pipeline.images.decode import decode_rgb
from data_pipeline.jobs.leases import SECONDS
from data_pipeline.jobs.ledger import Record, finished_tasks
from data_pipeline.jobs.worker import Job, Progress, Task, Work
from data_pipeline.packing.place import claim, finished, given_back
from data_pipeline.packing.rejects import REJECTS, Rejects
from data_pipeline.sources.pair import Unusable
from generation.config import OverlapConfig
from generation.evaluation.likeness import EvaluationVectors
from generation.evaluation.overlap_report import FLOOR, REPORT, report_of, write_report
from models.clip import Clip
from parallel.mesh import own_mesh
from parallel.precision import set_numerics
from training.export.weights import build_model, open_model

LIKENESS = "likeness/"


@dataclass(frozen=True, kw_only=True, slots=True)
class LikenessTask(Task):
    """One raw shard."""

    split: str
    first: int
    """Number of its first block in the split."""
    blocks: int


def find_overlap(
    raw: str, evaluation: str, dest: str, clip: Path, out: Path, config: OverlapConfig, worker: str
) -> dict[str, Any]:
    """Compare a data set with an evaluation set by a run's CLIP; write a view of the other pairs.

    Returns the content of overlap.json without the ids.
    Raises: ConfigError with every problem of the settings; InputError if OUT is another's folder.
    """
    check(config.problems())
    refuse_others_folder(out, "overlap")
    member = job_worker_of(worker)
    ranker = open_model(clip, "clip")
    theirs = open_evaluation(evaluation, SPLITS)
    model = build_model(ranker).to(own_mesh(member.number).world.device)
    assert isinstance(model, Clip)
    job = OverlapJob(open_store(raw), theirs, model, ranker.digest, config, out, member)
    body = job.run(open_store(dest) if dest else None)
    short = {name: value for name, value in body["evaluation"].items() if name != "ids"}
    return {**body, "evaluation": short}


class OverlapJob:
    """The comparison of a data set with an evaluation set, as one worker sees it."""

    def __init__(
        self,
        raw: Store,
        evaluation: EvaluationSet,
        clip: Clip,
        clip_hash: str,
        config: OverlapConfig,
        out: Path,
        member: JobWorker,
    ) -> None:
        """Pictures are embedded on the device of `clip`."""
        set_numerics(clip.log_scale.device, deterministic=False)
        self._raw, self._sources = raw, {split: RawSource(raw, split) for split in SPLITS}
        self._evaluation, self._pixels, self._config = evaluation, clip.config.pixels, config
        self._vectors = EvaluationVectors(evaluation, clip, config.batch)
        self._floor = min(FLOOR, config.threshold)
        self._store, self._member = FolderStore(out), member
        facts = {
            "evaluation": evaluation.fingerprint,
            "clip": clip_hash,
            "batch": config.batch,
            "floor": self._floor,
        }
        self._tasks = [
            task for split in SPLITS for task in _tasks(split, RawShards(raw, split), facts)
        ]
        self._request = {
            "source": "overlap",
            "raw": [source.fingerprint for source in self._sources.values()],
            "evaluation": evaluation.fingerprint,
            "clip": clip_hash,
            "config": to_json(config),
        }

    def run(self, dest: Store | None = None) -> dict[str, Any]:
        """Compare until all shards are compared, by any worker; returns overlap.json's content.

        With a DEST, one worker writes a view of RAW there, of the pairs below the threshold.
        Raises: InputError if DEST holds other data, or a split has no pair left.
        """
        if dest is not None:
            claim(dest, self._request)
        tasks = [task.name for task in self._tasks]
        asked = {"tasks": tasks, "threshold": self._config.threshold}
        folder = f"{LIKENESS}{sha256(canonical_json(asked))[:12]}/"
        job = Job(self._store, self._tasks, self._member, SECONDS)
        finisher = job.finisher(LIKENESS, folder + REPORT, lambda: self._report(folder))
        job.announce("overlap", [finisher])
        job.run(Work(make=self._make), [finisher])
        if dest is not None:
            self._write(dest)
        for name in self._store.names(folder):
            self._store.put(name.removeprefix(folder), self._store.get(name))
        body: dict[str, Any] = json.loads(self._store.get(REPORT))
        if body["unreadable"]:
            LOG.warning("%d pairs cannot be decoded and are left out", body["unreadable"])
        return body

    def _make(self, task: LikenessTask, progress: Progress) -> Record:
        blocks = range(task.first, task.first + task.blocks)
        return self._vectors.compare(self._sources[task.split], blocks, self._floor, progress)

    def _records(self) -> list[Record]:
        """The records of the tasks in their order; none if one is not done."""
        done = dict(finished_tasks(self._store, LIKENESS))
        if not all(task.name in done for task in self._tasks):
            return []
        return [done[task.name] for task in self._tasks]

    def _report(self, folder: str) -> bool:
        records = self._records()
        if not records:
            return False
        training = sum(task.split == "train" for task in self._tasks)
        body = report_of(records, training, self._evaluation, self._config.threshold)
        write_report(self._store, folder, body, self._shown)
        return True

    def _shown(self, number: int, row: list[Any]) -> NDArray[np.uint8]:
        """A pair's picture and the nearest one of the evaluation set, (2, S, S, 3)."""
        task, place = self._tasks[number], int(row[0])
        source = self._sources[task.split]
        block = task.first
        while place >= source.sizes[block]:
            place, block = place - int(source.sizes[block]), block + 1
        record = source.read(block)[place]
        ours = square(decode_rgb(record.image, record.key), self._pixels)
        return np.stack([ours, self._vectors.picture(self._evaluation.pictures[row[3]])])

    def _write(self, dest: Store) -> None:
        """Write the view, or wait for the worker that does."""
        if finished(dest):
            LOG.info("%s already holds this data set", dest.url)
            return
        job = Job[Task](dest, [], self._member, SECONDS)
        finisher = job.finisher("", f"{SPLITS[-1]}/{NAME}", lambda: self._write_kept(dest))
        with given_back(dest):
            finisher.finish()
        finisher.sweep()

    def _write_kept(self, dest: Store) -> bool:
        """Write views of RAW without the pairs that DEST does not get: no picture is copied."""
        rejects, masks = Rejects(dest, 1.0), dict[str, list[Kept | None]]()
        for split in SPLITS:
            masks[split] = []
        for task, record in zip(self._tasks, self._records(), strict=True):
            left_out = self._left_out(record)
            for place in sorted(left_out):
                rejects.add(left_out[place], True)
            kept = np.ones(task.size, np.bool_)
            kept[list(left_out)] = False
            masks[task.split].append(kept if left_out else None)
        for split, rows in masks.items():
            if not any(kept is None or kept.any() for kept in rows):
                raise InputError(f"no pair of the {split} split is left; raise the threshold")
        rejects.flush()
        for split, source in self._sources.items():
            facts = {k: v for k, v in source.manifest.facts.items() if k != CATALOGUE}
            base = Base(store=self._raw, split=split, keep=masks[split].__getitem__)
            facts |= {"overlap": self._request}
            write_view(dest, f"{split}/", [base], facts, dict(rejects.kinds))
        LOG.info("%s; each with its reason in %s/%s", dict(rejects.kinds), dest.url, REJECTS)
        return True

    def _left_out(self, record: Record) -> dict[int, Unusable]:
        """The pairs of a task that DEST does not get, by their place."""
        left_out = {
            place: Unusable(key=key, kind="image", reason=reason)
            for place, key, reason in record["unreadable"]
        }
        for place, key, cosine, other in record["near"]:
            if cosine >= self._config.threshold:
                name = self._evaluation.pictures[other]
                reason = f"likeness {cosine:.4f} to {name} of the evaluation set"
                left_out[place] = Unusable(key=key, kind="overlap", reason=reason)
        return left_out


def _tasks(split: str, source: RawShards, facts: dict[str, Any]) -> list[LikenessTask]:
    tasks, first = [], 0
    for number, shard in enumerate(source.manifest.shards):
        content = {"split": split, "shard": source.digest(number)}
        name = sha256(canonical_json({**content, **facts}))
        tasks.append(
            LikenessTask(
                prefix=LIKENESS,
                name=name,
                shown=f"{split}/{shard.name}",
                size=shard.samples,
                split=split,
                first=first,
                blocks=shard.blocks,
            )
        )
        first += shard.blocks
    return tasks
