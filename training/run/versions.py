"""The versions of a run's data set: the one of a position, and a newer one at an epoch's end.

A run reads the version that it began with, whatever is appended to the set. With --grow it looks
for a newer one after each epoch. Rank 0 decides, and all ranks read the same.
"""

from typing import Any

from core.log import LOG
from data_pipeline.streaming.state import StreamState
from data_pipeline.streaming.stream import BlockSource, Records
from parallel.mesh import Mesh
from training.tasks.splits import Splits, open_newer, open_version


class DataVersions:
    """The versions that a task can read; its methods are collective over all ranks."""

    def __init__(self, task: Any, place: str, mesh: Mesh) -> None:
        self._task, self._place, self._mesh = task, place, mesh

    @property
    def number(self) -> int:
        """Number of the version that the task reads."""
        return int(self._task.train.manifest.version)

    def of(self, state: StreamState) -> BlockSource[Records] | None:
        """Make the task read the version of a position; None if it does already.

        Held-out pairs remain those of the version that the run began with: losses are comparable.
        Raises: InputError on every rank if the data set does not have that version any more.
        """
        first, now = state.all_versions[0][1], state.fingerprint
        task = self._task
        if now == task.train.fingerprint == first:
            return None
        kind = task.train.kind
        return self._read(open_version(self._place, kind, self._mesh, train=now, held_out=first))

    def newer(self, state: StreamState) -> BlockSource[Records] | None:
        """Make the task read the version of the next epoch; None if it is the present one.

        Raises: InputError on every rank if other data has taken the place of the data set.
        """
        planned = state.version_at(state.epoch + 1)
        if planned != state.fingerprint:
            return self._read(
                open_version(self._place, self._task.train.kind, self._mesh, train=planned)
            )
        splits = open_newer(self._place, self._task.train.kind, self._mesh, state.fingerprint)
        if splits and self._mesh.world.rank == 0:
            manifest = splits["train"].manifest
            LOG.info(
                "epoch %d reads version %d of %s: %d pairs",
                *(state.epoch + 1, manifest.version, self._place, manifest.samples),
            )
        return self._read(splits) if splits else None

    def _read(self, splits: Splits) -> BlockSource[Records]:
        task = self._task
        task.train = task.train.at(splits["train"])
        if "validation" in splits:
            task.held_out = task.held_out.at(splits["validation"])
        source: BlockSource[Records] = task.train
        return source
