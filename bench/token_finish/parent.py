"""The end of a token job over 125,000 synthetic shards of 2,000 records (250 million pairs).

requests    to the store, a shard; an S3 store's listings count a request for 1,000 names
memory      highest resident set of the finishing process, torch and the raw manifest included
seconds     from the lease to the manifest

The job is in a folder, or with `--s3` in a SeaweedFS of its own (2,000 shards). It is taken once:
its spread is the figure itself. A folder of the full size needs 8 GB, its making some minutes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.support.children import child_environment, module_command
from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.token_finish.job import write_job
from cluster.object_server import object_server
from core.storage.store import open_store

FOLDER = cache("token-finish")
REQUESTS, MEGABYTES, SECONDS = 4.0, 500.0, 600.0
"""Targets: a shard, of the process, of the whole end."""
BUCKET = "bench-token-finish"


def run(shards: int = 0, s3: bool = False) -> list[dict[str, Any]]:
    """Rows; ratio > 1 is better than the target."""
    shards = shards or sized(2000 if s3 else 125_000, 300)
    with _place(s3) as (place, environment):
        raw, tokens = f"{place}/raw", f"{place}/tokens"
        write_job(open_store(raw), open_store(tokens), shards)
        done = subprocess.run(
            module_command("bench.token_finish.child", raw, tokens),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), file=sys.stderr)
    each = sum(row["requests"].values()) / shards
    peak, where = row["megabytes"]["peak"], "SeaweedFS" if s3 else "a folder"
    of = f"{shards} shards in {where}"
    return [
        bench_row(f"requests a shard, {of}", each, "", "target", [REQUESTS / each]),
        bench_row(f"memory, {of}", peak, "MB", "target", [MEGABYTES / peak]),
        bench_row(f"seconds, {of}", row["seconds"], "s", "target", [SECONDS / row["seconds"]]),
        bench_row(f"CPU, {of}", row["cpu"], "s", "target", [SECONDS / row["cpu"]]),
    ]


@contextmanager
def _place(s3: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """Where the job is, and the environment of its worker."""
    if not s3:
        yield str(FOLDER), child_environment()
        return
    with object_server(FOLDER / "weed", BUCKET) as server, server.credentials():
        environment = child_environment({**os.environ, **server.environment})
        yield f"s3://{BUCKET}/{os.getpid()}", environment
