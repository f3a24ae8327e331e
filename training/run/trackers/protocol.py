"""What a tracker does. A further one is a class like trackio_run.py's, and an entry point."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.files.atomic import Json


class Tracker(Protocol):
    """The run in one tracker; called on rank 0, by one thread. It may raise anything."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Figures of one row of metrics.jsonl, as `train/loss` or `time/compute`."""

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Shapes: (H, W, 3)."""

    def histogram(self, name: str, values: NDArray[Any], step: int) -> None:
        """Integers from 0. Shapes: (n,)."""

    def close(self) -> None:
        """Write what is pending."""


OpenTracker = Callable[[Path, Json, int], Tracker]
"""(run folder, resolved settings, step) -> a tracker of the steps after this one."""


def bin_edges(values: NDArray[Any], most: int) -> list[float]:
    """Edges of at most `most` bins of equal width from 0 to above the largest value."""
    top = int(values.max()) + 1
    edges: list[float] = np.linspace(0, top, min(top, most) + 1).tolist()
    return edges


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's figures by tag: `train/loss`, `validation/loss`; nested ones as `comm/data/bytes`."""
    prefix = row.get("split", "train")
    values: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, int | float) and name != "step":
            values[f"{prefix}/{name}"] = value
        elif isinstance(value, dict):
            values.update(_leaves(name, value))
    return values


def _leaves(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    leaves: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            leaves.update(_leaves(f"{prefix}/{name}", value))
        elif isinstance(value, int | float):
            leaves[f"{prefix}/{name}"] = value
    return leaves
