"""Torch's flight recorders: the last collectives of each process group, written when asked for."""

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch._C._distributed_c10d as c10d

from core.heartbeat import DIAGNOSE, FOLDER

_KEPT = "200"
"""Collectives that are remembered."""
_RECORDERS = {"all": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}
"""torch's dump functions. In some versions the first covers only gloo; CPU builds lack NCCL's."""


def record_flight() -> None:
    """Remember collectives, and write them as flight-R.json when the supervisor asks.

    Call it before the process group is created. A thread writes the file, because the main thread
    hangs in a collective then; without a supervisor nothing is recorded.
    """
    folder, rank = os.environ.get(FOLDER), os.environ.get("RANK")
    if folder is None:
        return
    remember()

    def wait() -> None:
        while not Path(folder, DIAGNOSE).exists():
            time.sleep(0.5)
        part = Path(folder, f"flight-{rank}.part")
        part.write_text(json.dumps(last_collectives()))
        part.rename(Path(folder, f"flight-{rank}.json"))

    threading.Thread(target=wait, name="flight", daemon=True).start()


def remember() -> None:
    """Enable torch's flight recorder for process groups created from now on."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _KEPT)
    if not hasattr(c10d, _RECORDERS["all"]):  # an older torch knows only NCCL's variable
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", _KEPT)


def last_collectives() -> dict[str, Any]:
    """The recorded collectives of all backends of this process, as `entries` by time."""
    dumps = {name: getattr(c10d, function, None) for name, function in _RECORDERS.items()}
    return joined({name: json.loads(dump()) for name, dump in dumps.items() if dump is not None})


def joined(recorders: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge recorders: entries by time without duplicates, other fields by recorder name."""
    entries: dict[tuple[int, int, str], Any] = {}
    rest = {}
    for name, recorder in recorders.items():
        rest[name] = {key: value for key, value in recorder.items() if key != "entries"}
        for entry in recorder.get("entries", []):
            known = (
                entry.get("time_created_ns", 0),
                entry.get("record_id", 0),
                entry["profiling_name"],
            )
            entries.setdefault(known, entry)
    return {"entries": [entries[key] for key in sorted(entries)], "recorders": rest}
