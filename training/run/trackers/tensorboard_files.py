"""TensorBoard's event files in RUN/tensorboard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard.writer import SummaryWriter

from core.files.atomic import Json, canonical_json
from training.run.trackers.protocol import bin_edges

_MOST_BINS = 1024


class TensorBoard:
    """A tracker: `tensorboard --logdir RUN`."""

    def __init__(self, root: Path, config: Json, step: int) -> None:
        place = str(root / "tensorboard")
        self._board = SummaryWriter(place, purge_step=step + 1 if step else None)
        lines = canonical_json(config).decode().splitlines()
        self._board.add_text("config", "".join(f"    {line}\n" for line in lines), step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        self._board.add_image(name, image, step, dataformats="HWC")

    def histogram(self, name: str, values: NDArray[Any], step: int) -> None:
        self._board.add_histogram(name, values, step, bins=bin_edges(values, _MOST_BINS))

    def close(self) -> None:
        self._board.close()
