"""A wish to stop, from SIGTERM or SIGUSR1: noted at once, heeded between two steps."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_asked = False


def heed_stop_signals() -> None:
    """Note the signals from now on; call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


def stop_asked() -> bool:
    """Say whether this process was asked to stop."""
    return _asked


def _note(_number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True
