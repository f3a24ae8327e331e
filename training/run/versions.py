"""The versions of a run's data set: the one of a position, and a newer one at an epoch's end.

A run reads the version that it began with, whatever is appended to the set. With --grow it looks
for a newer one after each epoch. Rank 0 decides, and all ranks read the same.
"""

from typing import Any

from core.log import LOG
from data_pipeline.streaming.mixed_source import at_versions, parts_of
from data_pipeline.streaming.state import Position, StreamState
from data_pipeline.streaming.stream import BlockSource, Records
from parallel.mesh import Mesh
from training.tasks.splits import UNREAD, Splits, open_newer, open_versions


class DataVersions:
    """The versions that a task can read; its methods are collective over all ranks."""

    def __init__(self, task: Any, data: str, mesh: Mesh) -> None:
        """`data`: the place of the data set, or a mixture."""
        self._task, self._data, self._mesh = task, data, mesh

    @property
    def number(self) -> int:
        """Number of the version that the task reads."""
        return int(self._task.train.manifest.version)

    def of(self, state: Position) -> BlockSource[Records] | None:
        """Make the task read the version of a position, of each set; None if it does already.

        Held-out pairs remain those of the version that the run began with: losses are comparable.
        Raises: InputError on every rank if the data set does not have that version any more.
        """
        first, now, task = state.firsts, state.fingerprints, self._task
        own = [part.source.fingerprint for part in parts_of(task.train)]
        if now == own == first or len(now) != len(own):
            return None
        return self._read(open_versions(self._data, task.train.kind, self._mesh, now, first))

    def newer(self, state: Position) -> BlockSource[Records] | None:
        """Make the task read the version of the next epoch; None if it is the present one.

        Raises: InputError on every rank if other data has taken the place of the data set.
        """
        if not isinstance(state, StreamState):
            return None
        planned = state.version_at(state.epoch + 1)
        if planned != state.fingerprint:
            kind = self._task.train.kind
            return self._read(open_versions(self._data, kind, self._mesh, [planned]))
        splits = open_newer(self._data, self._task.train.kind, self._mesh, state.fingerprint)
        if splits != UNREAD and self._mesh.world.rank == 0:
            manifest = splits["train"][0].manifest
            LOG.info(
                "epoch %d reads version %d of %s: %d pairs",
                *(state.epoch + 1, manifest.version, self._data, manifest.samples),
            )
        return None if splits == UNREAD else self._read(splits)

    def _read(self, splits: Splits) -> BlockSource[Records]:
        task = self._task
        task.train = at_versions(task.train, splits["train"])
        if splits["validation"]:
            task.held_out = at_versions(task.held_out, splits["validation"])
        source: BlockSource[Records] = task.train
        return source
