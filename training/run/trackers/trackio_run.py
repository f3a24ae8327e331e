"""trackio: a dashboard on this machine, `trackio show`; its variable TRACKIO_DIR holds."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.files.atomic import Json
from training.run.trackers.protocol import bin_edges


class Trackio:
    """A tracker. After a rewind, the last row of a step counts."""

    def __init__(self, root: Path, config: Json, step: int) -> None:
        import trackio  # noqa: PLC0415 - an optional library

        self._trackio = trackio
        place = root.absolute()
        name = f"{place.parent.name}-{place.name}"
        self._run = trackio.init(
            os.environ.get("TRACKIO_PROJECT", "tapir"),
            name=name,
            config=config,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def histogram(self, name: str, values: NDArray[Any], step: int) -> None:
        counts = np.histogram(values, bins=bin_edges(values, 512))
        self._run.log({name: self._trackio.Histogram(np_histogram=counts)}, step=step)

    def close(self) -> None:
        self._run.finish()
