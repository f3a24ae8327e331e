"""FID and IS equal torch-fidelity's, merge from parts, and grow worse with worse pictures."""

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import InputError
from core.keys import keyed_rng
from data_pipeline.sources.drawn.shapes import draw_scene, render
from data_pipeline.tokenize.encode import to_tensor
from models.clip import Clip
from models.config import ClipConfig
from models.critics.fid import ClassSums, Moments, frechet_distance, inception_score, part_of
from models.third_party import foreign_module


def _features(rows: int, width: int, seed: int, rank: int = 0) -> Any:
    rng = keyed_rng(seed, "features")
    mixed = rng.normal(size=(rows, rank or width)) @ rng.normal(size=(rank or width, width))
    return (mixed / 3 + rng.normal(size=width)).astype(np.float32)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(400, 24, 0), (300, 40, 7), (20, 64, 0), (2, 16, 0)]
)
def test_fid_equals_torch_fidelity(rows: int, width: int, rank: int) -> None:
    """Also with singular covariances: of low rank, and of fewer pictures than features."""
    theirs = foreign_module("torch_fidelity.metric_fid")
    one, two = _features(rows, width, 1, rank), _features(rows + 10, width, 2, rank)
    wide = [torch.from_numpy(x.astype(np.float64)) for x in (one, two)]
    statistics = [theirs.fid_features_to_statistics(x) for x in wide]
    expected = theirs.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(one), Moments.of(two)) == pytest.approx(expected, abs=1e-3)


def test_fid_of_a_set_with_itself_is_zero_and_symmetric() -> None:
    one, two = Moments.of(_features(50, 12, 1)), Moments.of(_features(60, 12, 2))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), abs=1e-6)
    with pytest.raises(InputError, match="at least two"):
        frechet_distance(one, Moments.of(_features(1, 12, 3)))


def test_sums_of_parts_are_those_of_the_whole() -> None:
    rows = _features(100, 10, 4)
    parts = reduce(add, [Moments.of(rows[i : i + 7]) for i in range(0, 100, 7)])
    assert parts.count == 100
    np.testing.assert_allclose(parts.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        parts.covariance, np.cov(rows.astype(float), rowvar=False), rtol=1e-9
    )


@pytest.mark.parametrize(("rows", "parts"), [(100, 10), (103, 10), (7, 7), (64, 3)])
def test_is_equals_torch_fidelity(rows: int, parts: int) -> None:
    theirs = foreign_module("torch_fidelity.metric_isc")
    logits = 3 * _features(rows, 20, 5)
    expected = theirs.isc_features_to_metric(torch.from_numpy(logits), parts, shuffle=False)
    places = np.array([part_of(i, rows, parts) for i in range(rows)])
    assert np.bincount(places).tolist() == [
        (i + 1) * rows // parts - i * rows // parts for i in range(parts)
    ]
    halves = [logits[places == i] for i in range(parts)]
    sums = [ClassSums.of(x[: len(x) // 2]) + ClassSums.of(x[len(x) // 2 :]) for x in halves]
    mean, spread = inception_score(sums)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert spread == pytest.approx(expected["inception_score_std"], rel=1e-6, abs=1e-9)


def test_a_class_that_is_never_seen_does_no_harm() -> None:
    logits = np.full((4, 3), -2000.0, np.float32)
    logits[:, 0] = 0
    assert ClassSums.of(logits).score == pytest.approx(1.0)


def test_fid_grows_with_the_noise_of_the_pictures() -> None:
    clip = Clip(ClipConfig(dim=32, heads=2, layers=2), 0).eval()
    shapes = np.stack([render(draw_scene(0, i), 32, 0, i) for i in range(240)]).astype(float)
    noise = keyed_rng(0, "noise").normal(size=(120, *shapes.shape[1:]))

    def moments(pictures: Any) -> Moments:
        with torch.no_grad():
            return Moments.of(clip.embed_image(to_tensor(pictures.astype(np.uint8))).numpy())

    real = moments(shapes[:120])
    distances = [
        frechet_distance(real, moments((shapes[120:] + level * noise).clip(0, 255)))
        for level in (0, 16, 32, 64, 128)
    ]
    assert distances == sorted(distances) and distances[-1] > 3 * distances[0]
