"""Synthetic perceptual hashes, with bands as crowded as those of photographs.

A picture is a sum of MODES cosine waves whose power falls with frequency to the power of FALL; its
hash has the signs of the differences that images/decode.py takes. The chance that two of them agree
in a band of 32 bits, in millionths, with and without nearly flat ones (FLAT_BITS):

    these pictures                                      2.1     0.80, 0.9% are nearly flat
    crops of 50 to 100% of 31 photographs               0.17    0.06, 0.65%
    crops of 8 to 100% of them                          34      1.1, 5%

The photographs are those of Debian's lomiri-wallpapers-16.04, -20.04 and mate-backgrounds (nature);
400 crops of each, pairs of different photographs.
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.images.decode import bit_order

FALL, MODES = 3.5, 40
_SIDE = 9
_TOGETHER = 2**17


def draw_looks(count: int, draw: np.random.Generator) -> NDArray[np.uint64]:
    """Hashes of pictures. Shapes: returns (count, 2)."""
    parts = []
    for begin in range(0, count, _TOGETHER):
        some = min(_TOGETHER, count - begin)
        waves = draw.standard_normal((some, MODES), np.float32)
        parts.append(np.packbits(waves @ _DIFFERENCES > 0, axis=1).view("<u8"))
    return np.concatenate(parts)


def flipped(looks: NDArray[np.uint64], most: int, draw: np.random.Generator) -> NDArray[np.uint64]:
    """Hashes with 1 to `most` other bits."""
    changed = looks.copy()
    bits = draw.integers(0, 128, (len(looks), most))
    count = draw.integers(1, most + 1, len(looks))
    for number in range(most):
        rows = np.flatnonzero(number < count)
        bit = bits[rows, number]
        changed[rows, bit // 64] ^= np.uint64(1) << (bit % 64).astype(np.uint64)
    return changed


def _differences() -> NDArray[np.float32]:
    """Wave -> difference of each bit. Shapes: returns (MODES, 128)."""
    frequency = np.hypot(*np.indices((_SIDE, _SIDE))).reshape(-1)
    chosen = np.argsort(frequency, kind="stable")[1 : MODES + 1]
    middle = (np.arange(_SIDE) + 0.5) / _SIDE
    wave = np.cos(np.pi * np.arange(_SIDE)[:, None] * middle)
    pictures = np.einsum("uy,vx->uvyx", wave, wave).reshape(-1, _SIDE, _SIDE)[chosen]
    pictures *= frequency[chosen, None, None] ** (-FALL / 2)
    across = pictures[:, :8, 1:] - pictures[:, :8, :-1]
    down = pictures[:, 1:, :8] - pictures[:, :-1, :8]
    bits = np.stack([across, down], 1).reshape(len(chosen), -1)
    return bits[:, bit_order()].astype(np.float32)


_DIFFERENCES = _differences()
