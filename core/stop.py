"""A wish to stop, from SIGTERM, SIGUSR1, the supervisor or a job: heeded between two steps.

The supervisor leaves a file instead of sending signals, for a rank that starts may not listen yet;
so does a job on several nodes, whose signals reach only the first one.
"""

import os
import signal
from types import FrameType

from core.heartbeat import FOLDER

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP = "stop"
"""A file in the folder of the heartbeats."""
STOP_FILE = "TAPIR_STOP"
"""Environment variable with the file of a job."""
_asked = False


def heed_stop_signals() -> None:
    """Note the signals from now on; call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


def stop_asked() -> bool:
    """Say whether this process was asked to stop; a job's file is looked for by rank 0 alone."""
    folder, job = os.environ.get(FOLDER), os.environ.get(STOP_FILE)
    return (
        _asked
        or (folder is not None and os.path.exists(os.path.join(folder, STOP)))
        or (bool(job) and os.environ.get("RANK", "0") == "0" and os.path.exists(str(job)))
    )


def _note(_number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True
