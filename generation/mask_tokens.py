"""Which tokens a mask picture redraws; imports no torch."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.images.crops import square

_BRIGHT = 128


def redrawn_tokens(mask: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Tokens under any bright pixel of a mask's middle square, (rows, columns).

    The mask, (H, W, 3) uint8, is scaled to whole pixels a token in either direction.
    """
    middle, (rows, columns) = square(mask, min(mask.shape[:2])), shape
    height, width = (count * max(1, round(len(middle) / count)) for count in shape)
    scaled = cv2.resize(middle, (width, height), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(scaled, cv2.COLOR_RGB2GRAY)
    cells = grey.reshape(rows, height // rows, columns, width // columns)
    return np.asarray(cells.max((1, 3)) >= _BRIGHT)
