"""SSIM by its formula."""

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.support.ssim import ssim
from core.keys import keyed_rng


def _pictures() -> NDArray[np.uint8]:
    return keyed_rng(0, "ssim").integers(0, 256, (2, 20, 20, 3)).astype(np.uint8)


def test_ssim_of_flat_pictures_is_that_of_their_means() -> None:
    """(2 a b + c) / (a^2 + b^2 + c) with a = 0.2, b = 0.6 and c = 0.0001."""
    first, second = (np.full((2, 16, 16, 3), value, np.uint8) for value in (51, 153))
    assert ssim(first, second) == pytest.approx((0.24 + 1e-4) / (0.4 + 1e-4), rel=1e-9)


def test_ssim_by_the_window_s_weights() -> None:
    """One window of 11 x 11, against sums with its Gaussian weights."""
    first, second = (p[0, :11, :11] for p in (_pictures(), 255 - _pictures() // 2))
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line)[..., None] / line.sum() ** 2
    a, b = first / 255, second / 255
    mean_a, mean_b = (weights * a).sum((0, 1)), (weights * b).sum((0, 1))
    var_a, var_b = (
        (weights * a * a).sum((0, 1)) - mean_a**2,
        (weights * b * b).sum((0, 1)) - mean_b**2,
    )
    both = (weights * a * b).sum((0, 1)) - mean_a * mean_b
    expected = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    expected *= (2 * both + 9e-4) / (var_a + var_b + 9e-4)
    assert ssim(first[None], second[None]) == pytest.approx(expected.mean(), rel=1e-6)


def test_ssim_of_a_picture_with_itself_is_one() -> None:
    assert ssim(_pictures(), _pictures()) == pytest.approx(1.0)
    assert ssim(_pictures(), _pictures()[::-1]) < 0.1
