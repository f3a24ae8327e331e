"""The checkpoints of a run: saving, retention, and finding the newest undamaged one."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpoint.config import CheckpointConfig
from checkpoint.format import MANIFEST, number_of, rank_file
from checkpoint.reader import CheckpointReader, finished_steps
from checkpoint.saver import Saver
from checkpoint.writer import Gather
from core.errors import CheckpointError, CorruptError, StoreError, TrainingError
from core.files.atomic import Json, remove_leftovers
from core.log import LOG
from core.storage.store import FolderStore, Store

_PROBE = "writable"
_PAUSES = (5.0, 30.0)
"""Seconds before each retry of a run's last save."""


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
        self._delete(lambda: self._unfinished(set(listed)), self._gather)
        text = self._gather(" ".join(map(str, listed)))[0]
        damaged = []
        for step in reversed([int(word) for word in text.split()]):
            reader, mine = None, ""
            try:
                reader = CheckpointReader(self.store, f"step-{step}")
                reader.verify(self._rank, self._ranks)
            except CorruptError as error:
                mine = str(error)
            told = json.dumps(sorted({error for error in self._gather(mine) if error}))
            errors = json.loads(self._gather(told)[0])
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

    def _note(self, step: int, facts: Json) -> None:
        loss = facts.get("validation_loss")
        self._known[step] = Saved(step=step, time=float(facts.get("time", 0)), loss=loss)

    def _written(self, step: int) -> None:
        self.whole = step
        self._delete(self._outdated, self.saver.gather)

    def _outdated(self) -> set[int]:
        """Steps that the policy does not keep."""
        finished = finished_steps(self.store)
        for step in finished:
            if step not in self._known:
                self._remember(step)
        kept = kept_steps([self._known[step] for step in finished], self._config) | self.protected
        return set(finished) - kept

    def _delete(self, steps: Callable[[], set[int]], gather: Gather) -> None:
        """Delete the steps that rank 0 finds; collective: each rank deletes its share of the files.

        Manifests go first, so that a partial checkpoint is never read. A file that cannot be
        deleted is logged and left to the next start.
        Raises: StoreError, on every rank, if rank 0 cannot find or delete manifests.
        """
        counts: list[tuple[int, int]] = []
        failure: StoreError | None = None
        try:
            counts = [self._forget(step) for step in sorted(steps())] if self._rank == 0 else []
        except StoreError as error:  # the others wait for what to delete
            failure = error
        told = gather(json.dumps({"counts": counts, "error": str(failure or "")}))[0]
        answer = json.loads(told)
        for step, count in answer["counts"]:
            for number in range(self._rank, count, self._ranks):
                self._delete_file(f"step-{step}/{rank_file(number)}")
        if answer["error"]:
            raise failure or StoreError(answer["error"])

    def _delete_file(self, name: str) -> None:
        try:
            self.store.delete(name)
        except StoreError as error:  # of this rank alone: it must not leave the others' collectives
            LOG.warning("%s; the next start of the run deletes it", error)

    def _forget(self, step: int) -> tuple[int, int]:
        """Delete a step's manifest; returns the step, and up to which number ranks have a file."""
        names = self.store.names(f"step-{step}/")
        self.store.delete(f"step-{step}/{MANIFEST}")
        return step, max((number_of(name) + 1 for name in names), default=0)

    def _unfinished(self, finished: set[int]) -> set[int]:
        """Steps of unfinished checkpoints; none if there are no finished ones.

        Deletes temporary files of writers that were killed: no name of the store shows them.
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
            return set()
        return unfinished

    def _all_steps(self) -> set[int]:
        numbers = {name.split("/")[0][5:] for name in self.store.names("step-")}
        return {int(text) for text in numbers if text.isdigit()}

    def _remember(self, step: int) -> None:
        try:
            self._note(step, CheckpointReader(self.store, f"step-{step}").facts)
        except (CorruptError, CheckpointError):
            self._note(step, {})


def save_surely(save: Callable[[], None], wait: Callable[[], None], tells: bool) -> None:
    """Save and wait, with retries in case disk space becomes free; `tells`: log each failure.

    Raises: TrainingError if all attempts fail.
    """
    for pause in (*_PAUSES, None):
        save()
        try:
            wait()
            return
        except StoreError as error:
            if pause is None:
                raise TrainingError(f"{error}; the last save could not be written") from error
            if tells:
                LOG.error("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
