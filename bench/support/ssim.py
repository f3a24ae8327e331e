"""Structural similarity of pictures."""

import cv2
import numpy as np
from numpy.typing import NDArray

WINDOW, SIGMA = 11, 1.5
STABLE = (0.01**2, 0.03**2)
"""Of pixels in [0, 1]."""


def ssim(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Mean SSIM of two batches, (n, S, S, 3), over pictures, colours and whole windows.

    Source: Wang et al. 2004, with its Gaussian window of 11 pixels.
    """
    rows = [_of_picture(a / 255, b / 255) for a, b in zip(first, second, strict=True)]
    return float(np.mean(rows))


def _of_picture(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a = _blurred(a * a) - mean_a**2
    var_b = _blurred(b * b) - mean_b**2
    both = _blurred(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + STABLE[0]) / (mean_a**2 + mean_b**2 + STABLE[0])
    return float((light * (2 * both + STABLE[1]) / (var_a + var_b + STABLE[1])).mean())


def _blurred(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the windows that are inside of the picture."""
    edge = WINDOW // 2
    blurred = cv2.GaussianBlur(x, (WINDOW, WINDOW), SIGMA)
    return np.asarray(blurred[edge:-edge, edge:-edge])
