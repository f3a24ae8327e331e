"""A verb of the command line that pauses before it marks each task as done, so that tests can kill.

python -m tests.multiprocess.jobs.slowly SECONDS GATE VERB ARGUMENTS

It marks one task; before it marks another, it waits until the file GATE exists. However fast a
worker is, it cannot finish a job of which others have yet to be killed.
"""

import sys
import time
from itertools import count
from pathlib import Path

import tapir
from data_pipeline.jobs.ledger import Ledger, Record

_COMMIT = Ledger.commit
_NUMBERS = count()


def _slowly(self: Ledger, task: str, record: Record) -> None:
    first = next(_NUMBERS) == 0
    time.sleep(SECONDS)
    while not (first or GATE.exists()):
        time.sleep(0.02)
    _COMMIT(self, task, record)


if __name__ == "__main__":
    SECONDS, GATE = float(sys.argv.pop(1)), Path(sys.argv.pop(1))
    Ledger.commit = _slowly  # type: ignore[method-assign]
    tapir.main()
