"""One process of the bench: it packs, does the work of packing alone, or copies as webdataset does.

python -m bench.pack.child WHAT SOURCE DEST WORKER THREADS

It imports everything, says "ready", waits for a line, and prints what the work took.
"""

import hashlib
import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from core.storage.store import open_store
from core.workers import job_worker_of
from data_pipeline.catalogue.schema import row_of
from data_pipeline.config import PackConfig
from data_pipeline.images.decode import inspect
from data_pipeline.packing.pack import pack
from data_pipeline.sources.pair import Pair
from data_pipeline.sources.plan import open_sources, plan_units
from data_pipeline.sources.units import unit_pairs
from data_pipeline.text.captions import clean_captions

_PAUSE = 0.05


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident() -> float:
    """Megabytes of memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


class _Memory:
    """Samples the resident set in the background."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._done = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._done.wait(_PAUSE):
            self.samples.append(_resident())

    def close(self) -> dict[str, float]:
        """Highest; and the last third's mean over that of the second."""
        self._done.set()
        rows = self.samples or [_resident()]
        third = max(1, len(rows) // 3)
        middle, last = rows[third : 2 * third] or rows, rows[-third:]
        ratio = (sum(last) / len(last)) / (sum(middle) / len(middle))
        return {"peak": max(rows), "growth": ratio}


def packed(source: str, dest: str, worker: str, threads: int) -> Callable[[], int]:
    """Pack as one worker of the job."""
    config = PackConfig(validation=0.2, threads=threads)

    def work() -> int:
        manifests = pack(source, open_store(dest), config, member=job_worker_of(worker))
        return sum(manifest.samples for manifest in manifests.values())

    return work


def bare(source: str, dest: str, worker: str, threads: int) -> Callable[[], int]:
    """Decode, hash and digest the same pairs from memory, in one thread as pack's."""
    sources = open_sources([source])
    plan = plan_units(sources, PackConfig())
    items = [
        item
        for unit in plan.units
        for item in unit_pairs(unit, sources[0].files, [], PackConfig())
        if isinstance(item, Pair)
    ]

    def look() -> int:
        for pair in items:
            captions = clean_captions(pair.caption, pair.where)
            row_of(pair, captions, inspect(pair.image, pair.where), "train")
            hashlib.sha256(pair.image).digest()
            crc32(pair.image)
        return len(items)

    def work() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(look).result()

    return work


def webdataset_written(source: str, dest: str, worker: str, threads: int) -> Callable[[], int]:
    """Read and write the archives by the webdataset library: no picture is decoded."""
    import webdataset  # noqa: PLC0415 - it imports torch

    names = sorted(str(path) for path in Path(source).glob("*.tar"))
    Path(dest).mkdir(parents=True, exist_ok=True)

    def work() -> int:
        count = 0
        with webdataset.ShardWriter(f"{dest}/%06d.tar", maxcount=2000, verbose=0) as sink:
            for sample in webdataset.WebDataset(names, shardshuffle=False):
                parts = {name: sample[name] for name in ("jpg", "txt", "json")}
                sink.write({"__key__": sample["__key__"], **parts})
                count += 1
        return count

    return work


WORK = {"pack": packed, "bare": bare, "webdataset": webdataset_written}


def main(what: str, source: str, dest: str, worker: str, threads: str) -> dict[str, Any]:
    """Wait for a line on standard input, then work."""
    work = WORK[what](source, dest, worker, int(threads))
    print("ready", flush=True)
    sys.stdin.readline()
    memory, cpu, began = _Memory(), _cpu(), time.perf_counter()
    pairs = work()
    seconds, used = time.perf_counter() - began, _cpu() - cpu
    return {"pairs": pairs, "seconds": seconds, "cpu": used, **memory.close()}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
