"""Torch's flight recorder: the last collectives of each process group, written when asked for."""

import os
import threading
import time
from pathlib import Path

import torch._C._distributed_c10d as c10d

from core.heartbeat import DIAGNOSE, FOLDER

_KEPT = "200"
"""Collectives that are remembered."""


def record_flight() -> None:
    """Remember collectives, and write them as flight-R.json when the supervisor asks.

    Call it before the process group is made. A thread writes, since the main one is stuck in a
    collective then; without a supervisor nothing is recorded.
    """
    folder, rank = os.environ.get(FOLDER), os.environ.get("RANK")
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    if folder is None or dump is None:
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _KEPT)

    def wait() -> None:
        while not Path(folder, DIAGNOSE).exists():
            time.sleep(0.5)
        part = Path(folder, f"flight-{rank}.part")
        part.write_bytes(dump())
        part.rename(Path(folder, f"flight-{rank}.json"))

    threading.Thread(target=wait, name="flight", daemon=True).start()
