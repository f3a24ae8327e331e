"""Stop requests by SIGTERM, SIGUSR1, the supervisor or a job; checked between two steps.

The supervisor writes a file instead of sending signals, because a starting rank may have no handler
yet; so does a job on several nodes, whose signals reach only the first node.
"""

import os
import signal
from types import FrameType

from core.heartbeat import FOLDER

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP = "stop"
"""A file in the heartbeat folder that requests a stop."""
STOP_FILE = "TAPIR_STOP"
"""Environment variable: a job's stop file."""
_asked = False


def heed_stop_signals() -> None:
    """Install the signal handlers; call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


def stop_asked() -> bool:
    """True if this process was asked to stop; only rank 0 checks a job's file."""
    folder, job = os.environ.get(FOLDER), os.environ.get(STOP_FILE)
    return (
        _asked
        or (folder is not None and os.path.exists(os.path.join(folder, STOP)))
        or (bool(job) and os.environ.get("RANK", "0") == "0" and os.path.exists(str(job)))
    )


def _note(_number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True
