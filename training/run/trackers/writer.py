"""Feeds a run's trackers; none of them can stop or delay its training."""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from queue import Full, Queue
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.files.atomic import Json
from core.log import LOG
from training.run.trackers.config import GROUP, names_of
from training.run.trackers.protocol import OpenTracker, Tracker, scalars_of
from training.run.trackers.tensorboard_files import TensorBoard
from training.run.trackers.trackio_run import Trackio
from training.run.trackers.wandb_run import WandB

OWN: dict[str, OpenTracker] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
_PENDING = 4096
"""Rows, pictures and histograms that may wait for a slow tracker; one that is slower is dropped."""
_SECONDS = 120.0
"""Wait for a tracker at the end of a run."""


class Trackers:
    """The trackers of one run, each on a thread of its own."""

    def __init__(self, root: Path, config: Json, track: str) -> None:
        """`track` is the setting: names with commas between them."""
        self._root, self._config, self._names = root, config, names_of(track)
        self._feeds: list[_Feed] = []

    def begin(self, step: int) -> None:
        """Open all trackers for the steps after `step`, also those that failed before."""
        self.close()
        self._feeds = [_Feed(name, self._root, self._config, step) for name in self._names]

    def row(self, row: Mapping[str, Any]) -> None:
        """Send the figures of a row of metrics.jsonl."""
        values, step = scalars_of(row), int(row["step"])
        self._send(lambda tracker: tracker.scalars(values, step))

    def show(self, name: str, value: NDArray[Any], step: int) -> None:
        """Send an image, (H, W, 3) uint8, or a histogram of integers, (n,)."""
        if np.ndim(value) == 3:
            self._send(lambda tracker: tracker.picture(name, value, step))
        else:
            self._send(lambda tracker: tracker.histogram(name, value, step))

    def close(self) -> None:
        """Let all trackers write what is pending, for a limited time."""
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.wait()
        self._feeds = []

    def _send(self, task: Callable[[Tracker], None]) -> None:
        for feed in self._feeds:
            feed.put(task)


class _Feed:
    """One tracker on its thread: a service that hangs holds up no step."""

    def __init__(self, name: str, root: Path, config: Json, step: int) -> None:
        self._name, self._dropped, self._telling = name, Event(), Lock()
        self._tasks: Queue[Callable[[Tracker], None] | None] = Queue(_PENDING)
        self._thread = Thread(
            target=self._serve, args=(root, config, step), name=f"tracker {name}", daemon=True
        )
        self._thread.start()

    def put(self, task: Callable[[Tracker], None] | None) -> None:
        """Queue a task; drops a tracker that does not keep up."""
        if self._dropped.is_set():
            return
        try:
            self._tasks.put_nowait(task)
        except Full:
            self._drop(f"it is {_PENDING} rows behind")

    def end(self) -> None:
        """Ask the tracker to close after all that was put."""
        self.put(None)

    def wait(self) -> None:
        """Wait for the tracker to close."""
        if self._dropped.is_set():
            return
        self._thread.join(_SECONDS)
        if self._thread.is_alive():
            self._drop(f"it did not close within {_SECONDS:.0f} s")

    def _serve(self, root: Path, config: Json, step: int) -> None:
        try:
            tracker = _opener(self._name)(root, config, step)
            while (task := self._tasks.get()) is not None and not self._dropped.is_set():
                task(tracker)
            tracker.close()
        except BaseException as error:  # whatever a library raises, SystemExit too: told, not lost
            self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, reason: str) -> None:
        """Leave the tracker out from now on, and say so once."""
        with self._telling:
            if self._dropped.is_set():
                return
            LOG.error(
                "the tracker %s failed (%s): training goes on without it, and metrics.jsonl has "
                "all rows",
                *(self._name, reason),
            )
            self._dropped.set()  # last: who sees it knows that it was told


def _opener(name: str) -> OpenTracker:
    if name in OWN:
        return OWN[name]
    opener: OpenTracker = entry_points(group=GROUP)[name].load()
    return opener
