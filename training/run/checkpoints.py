"""The checkpoints of a run: saving, retention, and finding the newest undamaged one."""

import time
from dataclasses import dataclass
from typing import Any

from checkpoint.config import CheckpointConfig
from checkpoint.reader import CheckpointReader, finished_steps
from checkpoint.saver import Saver
from checkpoint.writer import Gather
from core.errors import CheckpointError, CorruptError
from core.files.atomic import Json, remove_leftovers
from core.log import LOG
from core.storage.store import FolderStore, Store

_PROBE = "writable"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint, as the retention policy sees it."""

    step: int
    time: float
    """Unix seconds."""
    loss: float | None
    """Validation loss at its step, if validated."""


def kept_steps(saved: list[Saved], config: CheckpointConfig) -> set[int]:
    """Steps that the retention policy keeps: the newest, one per keep_every_hours, the best."""
    rows = sorted(saved, key=lambda row: row.step)
    kept = {row.step for row in rows[-config.keep :]}
    if config.keep_every_hours > 0:
        last = float("-inf")
        for row in rows:
            if row.time - last >= 3600 * config.keep_every_hours:
                kept.add(row.step)
                last = row.time
    measured = [row for row in rows if row.loss is not None]
    if config.best and measured:
        kept.add(min(measured, key=lambda row: (row.loss, row.step)).step)
    return kept


class Checkpoints:
    """The checkpoints of one run; public methods are collective over all ranks."""

    def __init__(
        self,
        store: Store,
        config: CheckpointConfig,
        rank: int,
        ranks: int,
        gathers: tuple[Gather, Gather],
    ) -> None:
        """`gathers` of the loop and, over a separate process group, of the background saver."""
        self.store, self._config = store, config
        self._rank, self._ranks, self._gather = rank, ranks, gathers[0]
        self.saver = Saver(store, rank, gathers[1], config.async_save)
        """Writes checkpoints, in the background if configured."""
        self._known: dict[int, Saved] = {}
        self.whole: int | None = None
        """Step of the newest checkpoint known to be undamaged; valid on rank 0."""
        self.protected: set[int] = set()
        """Steps that replay capsules start from; never deleted."""

    def newest(self) -> CheckpointReader | None:
        """The newest undamaged checkpoint; each rank verifies a share of it.

        Damaged checkpoints are reported and skipped, unfinished ones deleted.
        Raises: CheckpointError if all finished checkpoints are damaged; StoreInputError if the
        store is not writable, which is tested here instead of at the first save.
        """
        listed = finished_steps(self.store) if self._rank == 0 else []
        if self._rank == 0:
            self.store.put(_PROBE, b"")
            self.store.delete(_PROBE)
            self._sweep(set(listed))
        text = self._gather(" ".join(map(str, listed)))[0]
        damaged = []
        for step in reversed([int(word) for word in text.split()]):
            reader, mine = None, ""
            try:
                reader = CheckpointReader(self.store, f"step-{step}")
                reader.verify(self._rank, self._ranks)
            except CorruptError as error:
                mine = str(error)
            errors = sorted({error for error in self._gather(mine) if error})
            if not errors:
                assert reader is not None
                self._note(step, reader.facts)
                self.whole = step
                return reader
            LOG.warning("%s; trying an older checkpoint", "\n".join(errors))
            damaged += errors
        if damaged:
            raise CheckpointError(
                "no checkpoint of this run is whole; restore one of these, or train in another "
                "--out:\n" + "\n".join(damaged)
            )
        return None

    def save(self, step: int, slices: Any, facts: Json) -> float:
        """Write a checkpoint, in the background if configured; returns the seconds it blocked.

        Call `saver.settle()` first, and `failure()` later; older checkpoints stay intact.
        """
        facts = {**facts, "time": time.time()}
        self._note(step, facts)
        return self.saver.save(f"step-{step}", slices, facts, lambda: self._written(step))

    def failure(self) -> str:
        """The error of a save since the last call, or ""; also logs it."""
        error = self.saver.failure()
        if error is not None and self._rank == 0:
            LOG.error("%s; training goes on, older checkpoints are whole", error)
        return str(error or "")

    def delete(self, step: int) -> None:
        """Delete a checkpoint: its manifest first, so that a partial one is never read."""
        names = self.store.names(f"step-{step}/")
        for name in sorted(names, key=lambda name: not name.endswith("manifest.json")):
            self.store.delete(name)

    def _note(self, step: int, facts: Json) -> None:
        loss = facts.get("validation_loss")
        self._known[step] = Saved(step=step, time=float(facts.get("time", 0)), loss=loss)

    def _written(self, step: int) -> None:
        self.whole = step
        self._prune()

    def _prune(self) -> None:
        """Delete checkpoints that the policy does not keep."""
        if self._rank:
            return
        finished = finished_steps(self.store)
        for step in finished:
            if step not in self._known:
                self._remember(step)
        kept = kept_steps([self._known[step] for step in finished], self._config) | self.protected
        for step in set(finished) - kept:
            self.delete(step)

    def _sweep(self, finished: set[int]) -> None:
        """Delete unfinished checkpoints, unless there are no finished ones.

        Temporary files of writers that were killed go in any case: no name of the store shows them.
        """
        if isinstance(self.store, FolderStore):
            remove_leftovers(self.store.root)
        unfinished = self._all_steps() - finished
        if unfinished and not finished:
            LOG.warning(
                "%s holds only checkpoints without a manifest (steps %s): they were never finished "
                "or lost it, and the run starts from step 0",
                self.store.url,
                ", ".join(map(str, sorted(unfinished))),
            )
            return
        for step in unfinished:
            self.delete(step)

    def _all_steps(self) -> set[int]:
        numbers = {name.split("/")[0][5:] for name in self.store.names("step-")}
        return {int(text) for text in numbers if text.isdigit()}

    def _remember(self, step: int) -> None:
        try:
            self._note(step, CheckpointReader(self.store, f"step-{step}").facts)
        except (CorruptError, CheckpointError):
            self._note(step, {})
