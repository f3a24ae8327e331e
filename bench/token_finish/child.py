"""Ends the job of job.py as a worker does, and prints what it took; imported by no one.

python -m bench.token_finish.child RAW TOKENS
"""

import json
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import data_pipeline.tokenize.worker  # noqa: F401 - with torch: the memory of a worker
from bench.token_finish.job import PREFIX, facts, task_of
from core.storage.s3 import _PART
from core.storage.store import FolderStore, Store, open_store
from core.workers import JobWorker
from data_pipeline.config import TokenizeConfig
from data_pipeline.formats.manifest import RAW, read_manifest
from data_pipeline.tokenize.finish import Finisher
from data_pipeline.tokenize.leases import Leases

_PAGE = 1000
"""Names of one answer to a listing of an S3 store."""


class CountedStore:
    """Counts the requests that an S3 store would get."""

    def __init__(self, store: Store) -> None:
        self.store, self.url = store, store.url
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _count(self, kind: str, times: int = 1) -> None:
        with self._lock:
            self.requests[kind] += times

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self._count("GET")
        return self.store.get(name, start, length)

    def put(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        self._count("PUT")
        return self.store.put(name, data, if_absent)

    def put_parts(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        size = 0

        def counted() -> Iterator[bytes | memoryview]:
            nonlocal size
            for part in parts:
                size += len(part)
                yield part

        self.store.put_parts(name, counted())
        self._count("PUT", 1 if size < _PART else 2 + -(-size // _PART))

    def names(self, prefix: str = "") -> list[str]:
        names = self.store.names(prefix)
        self._count("LIST", max(1, -(-len(names) // _PAGE)))
        return names

    def exists(self, name: str) -> bool:
        self._count("HEAD")
        return self.store.exists(name)

    def delete(self, name: str) -> None:
        self._count("DELETE")
        self.store.delete(name)

    def etag(self, name: str) -> str:
        self._count("HEAD")
        return self.store.etag(name)


def _peak() -> float:
    """Megabytes of the resident set at its highest, since this program began."""
    with open("/proc/self/status") as file:
        line = next(row for row in file if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(raw: str, tokens: str) -> dict[str, Any]:
    """Read the raw manifest, finish the job, and tell what it took."""
    imported = _peak()
    store = CountedStore(open_store(tokens))
    config = TokenizeConfig()
    source = read_manifest(open_store(raw), PREFIX, RAW)
    tasks = [task_of(number) for number in range(len(source.shards))]
    leases = Leases(store, PREFIX, config.lease_seconds, JobWorker(number=0, count=1))
    finisher = Finisher(store, source, tasks, facts(source), config, leases)
    read, began = _peak(), time.perf_counter()
    finisher.finish()
    seconds, peak = time.perf_counter() - began, _peak()
    finisher.sweep()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "megabytes": {"imported": imported, "manifest": read, "peak": peak},
        "requests": dict(store.requests),
        "folder": isinstance(store.store, FolderStore),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
