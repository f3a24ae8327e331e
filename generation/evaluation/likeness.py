"""How alike pairs and the pictures of an evaluation set are: cosines of CLIP embeddings, by shard.

The record of a shard names its pairs that are at least `floor` alike, and the evaluation pictures
that one of its pairs is at least as alike to; all others are only counted.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import InputError
from core.log import LOG, progress
from data_pipeline.evaluation_sets import EvaluationSet
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.images.crops import square
from data_pipeline.images.decode import decode_rgb
from data_pipeline.jobs.ledger import Record
from data_pipeline.jobs.worker import Progress
from data_pipeline.streaming.readable import split_readable
from data_pipeline.tokenize.encode import squares_of, to_tensor
from models.clip import Clip


class EvaluationVectors:
    """The evaluation set's pictures, embedded when they are first needed."""

    def __init__(self, given: EvaluationSet, clip: Clip, batch: int) -> None:
        self._given, self._clip, self._batch = given, clip, batch
        self._unreadable: list[str] = []
        """Pictures that do not decode; they match nothing."""

    def picture(self, key: str) -> NDArray[np.uint8]:
        """One of its pictures, as CLIP sees it."""
        return square(decode_rgb(self._given.read(key), key), self._clip.config.pixels)

    def compare(self, source: RawSource, blocks: range, floor: float, shown: Progress) -> Record:
        """The record of some consecutive blocks; `shown` counts their pairs.

        near: [place among their pairs, key, cosine, place of the evaluation picture]; unreadable:
        [place, key, reason]; seen: [place of an evaluation picture, its largest cosine].
        """
        vectors, best = self._vectors, np.full(len(self._given.pictures), -1.0, np.float32)
        near, unreadable = list[list[Any]](), list[list[Any]]()
        for first, records in _batches(source, blocks, self._batch):
            good, bad = split_readable(records)
            places = {id(record): first + i for i, record in enumerate(records)}
            unreadable += [[places[id(r)], r.key, str(error)] for r, error in bad]
            if good:
                pixels = squares_of([picture for _, picture in good], self._clip.config.pixels)
                cosines = self._embed(pixels) @ vectors.T
                np.maximum(best, cosines.max(0), out=best)
                nearest, most = cosines.argmax(1), cosines.max(1)
                near += [
                    [places[id(good[i][0])], good[i][0].key, float(most[i]), int(nearest[i])]
                    for i in np.flatnonzero(most >= floor).tolist()
                ]
            shown["pairs"] += len(records)
        return {
            "pairs": shown["pairs"],
            "rejects": {"image": len(unreadable)} if unreadable else {},
            "near": near,
            "unreadable": unreadable,
            "seen": [[i, float(best[i])] for i in np.flatnonzero(best >= floor).tolist()],
            "evaluation_unreadable": len(self._unreadable),
        }

    @cached_property
    def _vectors(self) -> NDArray[np.float32]:
        """Unit vectors of its pictures."""
        keys, embedded = self._given.pictures, []
        with progress("embed", len(keys)) as meter:
            for start in range(0, len(keys), self._batch):
                embedded.append(self._embedded_part(keys[start : start + self._batch]))
                meter.update(len(embedded) * self._batch)
        if self._unreadable:
            LOG.warning(
                "%d of the evaluation set's %d pictures cannot be decoded, and are compared with "
                "nothing: %s ...",
                *(len(self._unreadable), len(keys), self._unreadable[0]),
            )
        return np.concatenate(embedded)

    def _embedded_part(self, keys: list[str]) -> NDArray[np.float32]:
        """Unit vectors of some of its pictures; zeros for those that do not decode."""
        side = self._clip.config.pixels
        pictures = np.zeros((len(keys), side, side, 3), np.uint8)
        readable = np.ones((len(keys), 1), np.float32)
        for place, key in enumerate(keys):
            try:
                pictures[place] = self.picture(key)
            except InputError:
                self._unreadable.append(key)
                readable[place] = 0
        return self._embed(to_tensor(pictures)) * readable

    @torch.no_grad()
    def _embed(self, pixels: Tensor) -> NDArray[np.float32]:
        device = self._clip.log_scale.device
        return np.asarray(self._clip.embed_image(pixels.to(device)).cpu().numpy())


def _batches(source: RawSource, blocks: range, size: int) -> Iterator[tuple[int, list[RawRecord]]]:
    """Records of consecutive blocks, with the place of each batch's first one; none spans two."""
    place = 0
    for block in blocks:
        records = list(source.read(block))
        for start in range(0, len(records), size):
            yield place + start, records[start : start + size]
        place += len(records)
