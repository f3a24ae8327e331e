"""A verb of the command line that pauses before it marks each task as done, so that tests can kill.

python -m tests.multiprocess.jobs.slowly SECONDS VERB ARGUMENTS
"""

import sys
import time

import tapir
from data_pipeline.jobs.ledger import Ledger, Record

_COMMIT = Ledger.commit


def _slowly(self: Ledger, task: str, record: Record) -> None:
    time.sleep(SECONDS)
    _COMMIT(self, task, record)


if __name__ == "__main__":
    SECONDS = float(sys.argv.pop(1))
    Ledger.commit = _slowly  # type: ignore[method-assign]
    tapir.main()
