"""The suite best-of-n: accuracy, FID and IS against the number of candidates N (figures 6, 9c).

Each caption has D candidates. For N, each of up to D / N disjoint groups of N gives one picture a
caption, the best-ranked of the group; a FID and an IS are computed of every group's pictures, so
that all are of equally many, and averaged. On shapes, accuracy is the mean over all choices of N.

    OUT/blocks-HASH/drawn-000012.safetensors   features, logits, scores, checks of a caption's draws
    OUT/blocks-HASH/real-000000.safetensors    features of the real pictures

HASH covers what decides them, so that a run that was killed goes on, and no other one mixes in.
--repeats only decides how they are averaged, and is not in it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from core.files.atomic import Json, canonical_json, sha256
from core.log import progress
from data_pipeline.evaluation_sets import EvaluationSet, open_evaluation
from data_pipeline.images.crops import square
from data_pipeline.images.decode import decode_rgb
from data_pipeline.sources.drawn.shapes import matches, parse_caption
from generation.evaluation.accuracy import best_of_shares, counts_up_to
from generation.evaluation.blocks import Blocks
from generation.evaluation.feature_extractors import Network
from generation.evaluation.open_score import open_network
from generation.evaluation.suites.config import BestOfNConfig
from generation.evaluation.suites.protocol import Inputs, Measured
from generation.evaluation.suites.record import settings_json
from generation.evaluation.suites.registry import suite_called
from generation.text_to_image import Studio
from models.critics.fid import ClassSums, frechet_distance_of_few
from training.export.tokenizers import facts_in

DRAWN, REAL = "drawn", "real"
_FEATURES, _LOGITS, _SCORES, _RIGHT = "features", "logits", "scores", "right"
Array = NDArray[Any]


class BestOfNSuite:
    """Captions with pictures, with many candidates each."""

    def __init__(
        self, inputs: Inputs, settings: BestOfNConfig, evaluation: EvaluationSet, network: Network
    ) -> None:
        self._settings, self._evaluation, self._network = settings, evaluation, network
        chosen = evaluation.choose(settings.captions, settings.seed)
        self._captions = [caption.text for caption in chosen]
        self._pictures = evaluation.pictures_of(chosen)
        self._pixels = facts_in(inputs.models.dvae).pixels
        self._checked = all(map(_is_of_shapes, self._captions))
        self.prompts: list[Json] = [{"caption": text} for text in self._captions]
        self.facts: Json = {"data": evaluation.fingerprint, "network": network.name}
        averages = suite_called("best-of-n").averages
        kept = {n: value for n, value in settings_json(settings).items() if n not in averages}
        asked = {**self.facts, "settings": kept, "models": inputs.digests}
        self._blocks = Blocks(
            folder=inputs.out / f"blocks-{sha256(canonical_json(asked))[:12]}",
            size=1,
            rows={DRAWN: len(chosen), REAL: 1},
        )

    def measure(self, studio: Callable[[], Studio]) -> Measured:
        self._make_real()
        opened = functools.cache(functools.partial(self._opened, studio))
        with progress("sample and rank", len(self._captions)) as meter:
            for i, caption in enumerate(self._captions):
                if not self._blocks.exists((DRAWN, i)):
                    self._make_drawn(opened(), i, caption)
                meter.update(i + 1)
        return self._measured()

    def _opened(self, studio: Callable[[], Studio]) -> Studio:
        opened = studio()
        opened.tell_cut(self._captions)
        return opened

    def _make_real(self) -> None:
        if self._blocks.exists((REAL, 0)):
            return
        read, where = self._evaluation.read, self._evaluation.name
        images = [decode_rgb(read(name), f"{name} of {where}") for name in self._pictures]
        seen, _ = self._network(np.stack([square(image, self._pixels) for image in images]))
        self._blocks.write((REAL, 0), {_FEATURES: seen})

    def _make_drawn(self, studio: Studio, number: int, caption: str) -> None:
        """Everything about a caption's candidates, in the order of drawing."""
        row = studio.draw([caption], self._settings.draws)[0]
        order = np.argsort(row.drawn)
        pictures, scores = row.pictures[order], row.scores[order]
        seen, classes = self._network(pictures)
        arrays = {_FEATURES: seen, _LOGITS: classes, _SCORES: scores}
        if self._checked:
            arrays[_RIGHT] = np.array([matches(caption, p) for p in pictures], np.float32)
        self._blocks.write((DRAWN, number), arrays)

    def _all(self, name: str) -> Array:
        """(captions, candidates, ...)."""
        return np.stack([array for _, array in self._blocks.read(DRAWN, name)])

    def _measured(self) -> Measured:
        features, logits, scores = map(self._all, (_FEATURES, _LOGITS, _SCORES))
        ((_, real),) = self._blocks.read(REAL, _FEATURES)
        rows = [
            _row(count, best_places(scores, count, self._settings.repeats), features, logits, real)
            for count in counts_up_to(scores.shape[1])
        ]
        if self._checked:
            shares = best_of_shares(self._all(_RIGHT) > 0, scores)
            rows = [{**row, "accuracy": shares[row["n"]]} for row in rows]
        results = {
            "label": self._network.label,
            "network": self._network.name,
            "captions": len(self._captions),
            "pictures": len(self._pictures),
            "candidates": scores.shape[1],
            "rows": rows,
        }
        return Measured(results=results, headline=_headline(self._network.proxy, rows))


def prepare(inputs: Inputs, settings: BestOfNConfig, prompts: list[Json] | None) -> BestOfNSuite:
    """Open the set and the network.

    Raises: InputError if the set has too few captions, or not the prompts of a file.
    """
    evaluation = open_evaluation(inputs.data)
    captions = [c.text for c in evaluation.choose(settings.captions, settings.seed)]
    network = open_network(settings.inception, inputs.models, captions, inputs.device)
    suite = BestOfNSuite(inputs, settings, evaluation, network)
    if len(captions) < 2:
        raise InputError(f"{evaluation.name} has fewer than two captions; a FID needs more")
    if prompts not in (None, suite.prompts):
        raise InputError(f"{inputs.data} does not choose the prompts of the file: another set")
    return suite


def best_places(scores: Array, count: int, repeats: int) -> Iterator[Array]:
    """The best-ranked candidate of each caption in each disjoint group of `count` candidates.

    Shapes: scores (captions, D) -> at most `repeats` arrays (captions,) of places in 0 ... D - 1.
    """
    for start in range(0, scores.shape[1] - count + 1, count)[:repeats]:
        yield start + scores[:, start : start + count].argmax(1)


def _row(n: int, groups: Iterator[Array], features: Array, logits: Array, real: Array) -> Json:
    """FID and IS of the best of N, means over the groups, and of two or more their deviations."""
    fids, scores = [], []
    for places in groups:
        captions = np.arange(len(places))
        fids.append(frechet_distance_of_few(features[captions, places], real))
        scores.append(ClassSums.of(logits[captions, places]).score)
    row: Json = {"n": n, "groups": len(fids)}
    for name, values in (("fid", fids), ("is", scores)):
        row[name] = float(np.mean(values))
        if len(values) > 1:
            row[f"{name}_std"] = float(np.std(values))
    return row


def _headline(proxy: bool, rows: list[Json]) -> dict[str, float]:
    last, label = rows[-1], "proxy " * proxy
    figures = {f"{label}FID": last["fid"], f"{label}IS": last["is"]}
    figures |= {"accuracy": last["accuracy"]} if "accuracy" in last else {}
    return {f"{name}, best of {last['n']}": value for name, value in figures.items()}


def _is_of_shapes(caption: str) -> bool:
    try:
        parse_caption(caption)
    except InputError:
        return False
    return True
