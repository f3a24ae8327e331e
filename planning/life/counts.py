"""What a rank asks of others: collective calls, messages, requests to the checkpoints' store."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.storage.store import FolderStore, Store
from parallel.ledger import OPERATIONS, PAIRS
from planning.rehearsal.patches import Change

CALLS, MESSAGES, REQUESTS = "collective calls", "messages", "checkpoint store requests"
COUNTED = (CALLS, MESSAGES, REQUESTS)
FIRST, SAVE, END = "first step", "save", "end"
_ESTABLISHED = "01"
_REQUESTS = [name for name, method in vars(Store).items() if name[0] != "_" and callable(method)]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The counts at one point of a rank's life."""

    what: str
    """FIRST, SAVE (after the save before has been written) or END."""
    step: int
    time: float
    """Seconds of the monotonic clock."""
    counts: dict[str, int]


class Counts:
    """Counts of this rank, which several threads add to."""

    def __init__(self) -> None:
        self._counts, self._lock = dict.fromkeys(COUNTED, 0), threading.Lock()
        self._local = threading.local()
        self.marks: list[dict[str, Any]] = []

    def add(self, kind: str) -> None:
        """Count one more."""
        with self._lock:
            self._counts[kind] += 1

    def mark(self, what: str, step: int) -> dict[str, Any]:
        """Note where the counts are now."""
        with self._lock:
            counts = dict(self._counts)
        self.marks.append(asdict(Mark(what=what, step=step, time=time.monotonic(), counts=counts)))
        return self.marks[-1]

    def changes(self) -> list[Change]:
        """Patches of torch.distributed that count this process's calls."""
        modules = (dist, dist.distributed_c10d)
        names = (*OPERATIONS, "barrier")
        counted = {name: self._counted(getattr(dist, name), _kind(name)) for name in names}
        return [(module, name, call) for module in modules for name, call in counted.items()]

    def store(self, url: str) -> FolderStore:
        """A folder whose requests are counted."""
        store = FolderStore(Path(url))
        for name in _REQUESTS:
            setattr(store, name, self._counted(getattr(store, name), REQUESTS))
        return store

    def _counted(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if getattr(self._local, "inside", False):  # a send calls isend
                return function(*arguments, **named)
            self.add(kind)
            self._local.inside = True
            try:
                return function(*arguments, **named)
            finally:
                self._local.inside = False

        return call


def _kind(operation: str) -> str:
    return MESSAGES if operation in PAIRS else CALLS


def connections(besides: int) -> int:
    """Open TCP connections of this process, without those from and to one port."""
    mine = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own
            mine.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    count = 0
    for table in ("tcp", "tcp6"):
        with suppress(OSError):  # a machine without IPv6
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, local, remote, state, *_, inode = line.split(maxsplit=10)[:10]
                ports = {int(address.rpartition(":")[2], 16) for address in (local, remote)}
                count += state == _ESTABLISHED and inode in mine and besides not in ports
    return count
