"""Task leases, so that another worker takes over the tasks of a dead one.

    <prefix>_leases/<task>.<generation>.json      put if absent: the first writer holds it

The holder renews its lease with an increasing beat. A worker that sees the same beat for `seconds`
of its own clock, or a holder that is a dead process of this machine, takes the next generation. Two
workers may do the same work for a while: their outputs are put if absent, too, so that only time is
lost.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import StoreError
from core.files.atomic import canonical_json
from core.log import LOG
from core.storage.store import Store
from core.workers import JobWorker

FOLDER = "_leases/"
_PARTS = ("progress", "holder")
SECONDS = 60.0
"""A lease that is not renewed for as long is taken over, where no setting says otherwise."""


@dataclass
class Pace:
    """What a worker has done since it began; every lease publishes it."""

    pairs: int = 0
    """Pairs of its finished tasks."""
    began: float = field(default_factory=time.monotonic)


class Leases:
    """The leases of one folder of a job, as one worker sees them."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        seconds: float,
        member: JobWorker,
        pace: Pace | None = None,
    ) -> None:
        self._store, self._prefix, self._seconds = store, prefix + FOLDER, seconds
        self._member, self._pace = member, pace or Pace()
        self._seen: dict[str, tuple[bytes, float]] = {}

    @property
    def pause(self) -> float:
        """Seconds between two looks at work that another worker holds."""
        return min(1.0, self._seconds / 8)

    def claim(self, task: str) -> str | None:
        """Claim a task; returns the lease's name, or None while another worker holds it."""
        held = self._store.names(f"{self._prefix}{task}.")
        if held and not self._is_left(held[-1]):
            return None
        number = int(held[-1].split(".")[-2]) + 1 if held else 0
        name = f"{self._prefix}{task}.{number:06d}.json"
        if not self._store.put(name, self._content(0, {}), if_absent=True):
            return None
        if held:
            LOG.info("worker %s takes over %s", self._member.text, task[:12])
        return name

    @contextmanager
    def held(self, name: str, progress: dict[str, Any]) -> Iterator[None]:
        """Renew a lease and publish `progress` in the background; delete the lease at exit."""
        done = threading.Event()

        def beat() -> None:
            number = 0
            while not done.wait(self._seconds / 4):
                number += 1
                try:
                    self._store.put(name, self._content(number, dict(progress)))
                except StoreError as error:
                    LOG.warning("the lease %s was not renewed: %s", name, error)

        thread = threading.Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._store.delete(name)

    def sweep(self) -> None:
        """Delete all remaining leases; call it when every task is done."""
        for name in self._store.names(self._prefix):
            self._store.delete(name)

    def _is_left(self, name: str) -> bool:
        try:
            content = self._store.get(name)
        except StoreError:
            return False  # released a moment ago
        before, since = self._seen.get(name, (b"", 0.0))
        if holder_is_dead(content):
            return True
        if content != before:
            self._seen[name] = content, time.monotonic()
            return False
        return time.monotonic() - since > self._seconds

    def _content(self, beat: int, progress: dict[str, Any]) -> bytes:
        pairs = self._pace.pairs + progress.get("pairs", 0)
        worked = {"pairs": pairs, "seconds": time.monotonic() - self._pace.began}
        body = {"worker": self._member.text, "beat": beat, "progress": progress, "worked": worked}
        return canonical_json({**body, "holder": {**_ME, "pid": os.getpid(), "is": _TOKEN}})


def read_leases(store: Store, prefix: str) -> list[dict[str, Any]]:
    """The newest lease of each task; for `tapir status`."""
    leases = []
    newest = {name.rsplit(".", 2)[0]: name for name in store.names(prefix + FOLDER)}
    for name in newest.values():
        try:
            content = store.get(name)
            body = json.loads(content)
        except (StoreError, ValueError):
            continue  # released a moment ago
        if isinstance(body, dict) and all(isinstance(body.get(n), dict) for n in _PARTS):
            leases.append({"task": name, "dead": holder_is_dead(content), **body})
    return leases


def _this_machine() -> dict[str, str]:
    """The scope of a process id: host, boot and PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": platform.node(), "boot": boot, "space": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"host": platform.node(), "boot": uuid.uuid4().hex, "space": ""}


def holder_is_dead(content: bytes) -> bool:
    """True if a lease's holder was a process of this machine that no longer exists."""
    try:
        holder = json.loads(content)["holder"]
    except (ValueError, KeyError, TypeError):
        return False
    mine = isinstance(holder, dict) and all(
        holder.get(name) == value for name, value in _ME.items()
    )
    return mine and not Path(f"/proc/{holder.get('pid')}").exists()


_ME = _this_machine()
_TOKEN = uuid.uuid4().hex
