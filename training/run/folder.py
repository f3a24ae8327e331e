"""The run folder: one owner at a time, and metrics without gaps or duplicates."""

import json
import math
import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from core.errors import if_full
from core.files.atomic import Json, canonical_json, held, remove_leftovers, write_atomic
from core.heartbeat import FOLDER, Beat, read_beats
from core.log import LOG
from training.run.metrics import rows_of
from training.run.trackers.writer import Trackers

HISTORY = "history.json"


class RunFolder:
    """The locked run folder of rank 0; the other ranks write nothing."""

    def __init__(self, root: Path, config: Json, writes: bool, track: str = "") -> None:
        """`track` names the trackers that get all rows, pictures and histograms, too.

        Raises: InputError if another run holds the lock, or the folder is not writable.
        """
        self.root, self._writes = root, writes
        self._lock = ExitStack()
        if writes:
            self._lock.enter_context(held(root, "run"))
            remove_leftovers(root)
            self._config = canonical_json(config)
        self._metrics = root / "metrics.jsonl"
        self._trackers = Trackers(root, config, track)
        self._began = False
        self._unwritten: list[str] = []
        """Rows that are not written yet, e.g. because the disk was full."""

    def begin(self, step: int) -> None:
        """Start writing after `step`; removes rows of later steps, written before a crash."""
        if not self._writes:
            return
        write_atomic(self.root / "config.json", self._config)
        if self._metrics.exists():
            rows = self._metrics.read_text(errors="replace").splitlines()
            kept = [row for row in rows if _step_of(row) <= step]
            write_atomic(self._metrics, "".join(row + "\n" for row in kept).encode())
        self._trackers.begin(step)
        self._began = True
        write_live(self.root)

    def note_history(self, events: list[Json]) -> None:
        """Write what happened to the run besides training: history.json, if there is something.

        One that another run left in this folder is removed.
        """
        if self._writes and events:
            write_atomic(self.root / HISTORY, canonical_json({"events": events}))
        elif self._writes:
            (self.root / HISTORY).unlink(missing_ok=True)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl, and send it to the trackers."""
        if not self._began:
            return
        clean = {
            k: (v if not isinstance(v, float) or math.isfinite(v) else str(v))
            for k, v in row.items()
        }
        self._unwritten.append(json.dumps(clean) + "\n")
        try:
            self._append()
        except OSError as error:
            LOG.error(
                "step %d: cannot write metrics: %s%s; training goes on, and rows are written later",
                *(row["step"], error, if_full(error)),
            )
        self._trackers.row(row)

    def _append(self) -> None:
        """Write pending rows; truncates a partly written row on an error."""
        whole = self._metrics.stat().st_size if self._metrics.exists() else 0
        try:
            with open(self._metrics, "a") as file:
                file.write("".join(self._unwritten))
        except OSError:
            with suppress(OSError):
                os.truncate(self._metrics, whole)
            raise
        self._unwritten.clear()

    def show(self, name: str, value: Any, step: int) -> None:
        """Send an image, (H, W, 3) uint8, or a histogram of integers, (n,), to the trackers."""
        self._trackers.show(name, value, step)

    def close(self) -> None:
        self._trackers.close()
        self._lock.close()


def _step_of(row: str) -> float:
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf


def read_metrics(root: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl, without invalid lines."""
    return read_rows(root)[0]


def read_rows(root: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a run's metrics.jsonl, and the number of invalid lines."""
    path = root / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return rows_of(lines, str(path))


_NAME = "live.json"


def write_live(run: Path) -> None:
    """Record this host, and the heartbeat folder if there is a supervisor."""
    note = {"host": socket.gethostname(), "beats": os.environ.get(FOLDER, "")}
    write_atomic(run / _NAME, canonical_json(note))


def beats_of(run: Path) -> list[Beat]:
    """The last heartbeats of a run's ranks; empty if they are not on this machine."""
    try:
        note = json.loads((run / _NAME).read_text())
        folder = Path(note["beats"])
        if note["host"] != socket.gethostname() or not (note["beats"] and folder.is_dir()):
            return []
        return read_beats(folder, len(list(folder.glob("heart-*"))))
    except (OSError, ValueError, KeyError, TypeError):
        return []
