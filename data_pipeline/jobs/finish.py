"""The end of a job: one worker at a time writes its result.

The worker that finds all tasks done claims the lease `manifest`; the others wait for the result,
and take over if the holder dies. The result depends on the tasks' records alone, in the order of
the tasks, so that every finisher writes the same bytes.
"""

import time
from collections.abc import Callable

from core.storage.store import Store
from data_pipeline.jobs.leases import Leases
from data_pipeline.jobs.ledger import sweep_ledgers

_TASK = "manifest"


class Finisher:
    """The end of one folder of a job, as one worker sees it."""

    def __init__(
        self, store: Store, prefix: str, leases: Leases, result: str, write: Callable[[], bool]
    ) -> None:
        """`write` reads the records and writes everything, the object `result` last.

        It returns False, having written nothing that counts, if a task's marker is gone.
        """
        self._store, self.prefix, self._leases = store, prefix, leases
        self.result, self._write = result, write

    def finished(self) -> bool:
        """True if the result exists."""
        return self._store.exists(self.result)

    def finish(self, again: bool = False) -> bool:
        """Write the result, or wait for the worker that does; False if a task is not done.

        `again` writes it in any case. Raises: what `write` raises.
        """
        while again or not self.finished():
            lease = self._leases.claim(_TASK)
            if lease is None:
                time.sleep(self._leases.pause)
                continue
            with self._leases.held(lease, {"shard": "the manifest"}):
                if (again or not self.finished()) and not self._write():
                    return False
            again = False
        return True

    def sweep(self) -> None:
        """Delete the ledgers and leases of a finished folder."""
        sweep_ledgers(self._store, self.prefix)
        self._leases.sweep()
