"""Ends the job of job.py as a worker does, and prints what it took; imported by no one.

python -m bench.token_finish.child RAW TOKENS
"""

import json
import resource
import sys
import time
from dataclasses import replace
from typing import Any

from bench.support.counted import CountedStore
from bench.token_finish.job import PREFIX, facts, task_of
from core.storage.store import FolderStore, open_store
from core.workers import JobWorker
from data_pipeline.config import TokenizeConfig
from data_pipeline.formats.manifest import NAME
from data_pipeline.formats.raw_shards import RawShards
from data_pipeline.jobs.finish import Finisher
from data_pipeline.jobs.leases import Leases
from data_pipeline.tokenize.finish import ManifestWriter
from data_pipeline.tokenize.worker import ShardTask


def _peak() -> float:
    """Megabytes of the resident set at its highest, since this program began."""
    with open("/proc/self/status") as file:
        line = next(row for row in file if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(raw: str, tokens: str) -> dict[str, Any]:
    """Read the raw manifest, finish the job, and tell what it took."""
    imported = _peak()
    store = CountedStore(open_store(tokens), names=False)
    config = TokenizeConfig()
    source = RawShards(open_store(raw), PREFIX.rstrip("/"))
    given, pairs = facts(source.manifest), source.manifest.samples
    tasks = [  # as a worker holds them
        replace(ShardTask.of("train", number, source, given), name=task_of(number))
        for number in range(len(source.manifest.shards))
    ]
    leases = Leases(store, PREFIX, config.lease_seconds, JobWorker(number=0, count=1))
    writer = ManifestWriter(store, pairs, [task.name for task in tasks], given, config)
    finisher = Finisher(store, PREFIX, leases, PREFIX + NAME, writer.write)
    read, began = _peak(), time.perf_counter()
    finisher.finish()
    seconds, peak = time.perf_counter() - began, _peak()
    finisher.sweep()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "megabytes": {"imported": imported, "begun": read, "peak": peak},
        "requests": dict(store.requests),
        "folder": isinstance(store.store, FolderStore),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
