"""A wish to stop, from SIGTERM, SIGUSR1 or the supervisor: heeded between two steps.

The supervisor leaves a file instead of sending signals, for a rank that starts may not listen yet.
"""

import os
import signal
from types import FrameType

from core.heartbeat import FOLDER

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP = "stop"
"""A file in the folder of the heartbeats."""
_asked = False


def heed_stop_signals() -> None:
    """Note the signals from now on; call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


def stop_asked() -> bool:
    """Say whether this process was asked to stop."""
    folder = os.environ.get(FOLDER)
    return _asked or (folder is not None and os.path.exists(os.path.join(folder, STOP)))


def _note(_number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True
