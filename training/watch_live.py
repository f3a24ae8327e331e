"""Where the ranks of a run in progress show signs of life: a note in the run folder."""

import json
import os
import socket
from pathlib import Path

from core.files import canonical_json, write_atomic
from core.heartbeat import FOLDER, Beat, read_beats

_NAME = "live.json"


def write_live(run: Path) -> None:
    """Note this machine, and the folder of the heartbeats if a supervisor listens."""
    note = {"host": socket.gethostname(), "beats": os.environ.get(FOLDER, "")}
    write_atomic(run / _NAME, canonical_json(note))


def beats_of(run: Path) -> list[Beat]:
    """The last signs of life of a run's ranks, if they run on this machine; else none."""
    try:
        note = json.loads((run / _NAME).read_text())
        folder = Path(note["beats"])
        if note["host"] != socket.gethostname() or not (note["beats"] and folder.is_dir()):
            return []
        return read_beats(folder, len(list(folder.glob("heart-*"))))
    except (OSError, ValueError, KeyError, TypeError):
        return []
