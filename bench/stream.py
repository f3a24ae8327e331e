"""Five million real records from SeaweedFS: start, memory, and how long a trainer waits.

2,500 shards of 2,048 records of 1,024 image and 256 text tokens (13.1 GB), written by the project's
own writers and read by its stream over S3 on loopback, in child processes:

start       seconds from the address alone to the first batch, with all 2,500 shards
memory      resident size over the whole stream; its last third against its first
wait        share of the step that a trainer of STEP_SECONDS waits
stalls      the same while the store repeatedly stalls for 2 s (a proxy in between)

The start is the median of three; the others are one run of 1.5 to 3 minutes each.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil

from bench.support.children import call_command, child_environment, module_command
from bench.support.proxy import faulty_proxy
from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.synthetic import write_tokens
from cluster.object_server import object_server
from core.storage.s3 import S3Store
from core.storage.store import open_store
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.streaming.stream import Stream

FOLDER = cache("stream")
SHARDS, RECORDS, BLOCK = sized(2500, 4), sized(2048, 256), sized(128, 16)
BUCKET, PLACE = "bench-stream", "s3://bench-stream/tokens"
ORDER, BATCH = OrderConfig(lanes=16, shuffle_buffer=8), 64
STEP_SECONDS, WAIT_STEPS = sized(0.05, 0.01), sized(2000, 20)
TRAINED = sized(60, 20)
"""Steps of the training run."""
SAMPLES_A_STEP = sized(8, 2)
STALL_EVERY, STALL_SECONDS = 10.0, 2.0
SAMPLES = sized(300, 6)
STARTS = sized(3, 1)


def run() -> list[dict[str, Any]]:
    """Rows; ratio > 1 is better than the target."""
    with object_server(FOLDER / "weed", BUCKET) as server:
        with server.credentials():
            _write()
        here = {**child_environment(), **server.environment}
        starts = [_child("start", here)["seconds"] for _ in range(STARTS)]
        waits = _child("wait", here)
        share = _trained(here)
        with faulty_proxy(server.endpoint, _stalls()) as address:
            stalled = _child("wait", {**here, "AWS_ENDPOINT_URL": address})
        whole = _child("whole", here)
    assert whole["records"] > 0.95 * SHARDS * RECORDS, whole
    growth = whole["last_third_mb"] / whole["first_third_mb"]
    rows = [
        (f"start with {SHARDS:,} shards to the first batch", statistics.median(starts), "s", 2.0),
        ("last third's memory over the first's", growth, "x", 1.05),
        ("share of its steps that a training run waits for data", share, "", 0.005),
        ("share of a 50 ms step waited for data", waits["share"], "", 0.005),
        ("p99.9 of the wait, store standing still for 2 s", stalled["p999"], "s", 2.0),
    ]
    results = [
        bench_row(name, value, unit, f"at most {most}", [most / max(value, 1e-6)])
        for name, value, unit, most in rows
    ]
    print(json.dumps({"starts": starts, "waits": waits, "stalled": stalled, "whole": whole}))
    return results


def _write() -> None:
    store = S3Store(BUCKET, "tokens")
    if store.exists("train/manifest.json"):
        return
    began = time.monotonic()
    write_tokens(store, 1, 64, BLOCK, split="validation")
    write_tokens(store, SHARDS, RECORDS, BLOCK)
    print(f"wrote the data in {time.monotonic() - began:.0f} s", file=sys.stderr)


def _trained(environment: dict[str, str]) -> float:
    """Train a small prior on these records; the share of its steps that it waited for data."""
    out = FOLDER / "prior"
    shutil.rmtree(out, ignore_errors=True)
    flags = [
        "--model.layers=2",
        f"--loop.global-batch-size={SAMPLES_A_STEP}",
        f"--order.lanes={SAMPLES_A_STEP}",
        f"--loop.steps={TRAINED}",
        "--loop.log-every=10",
    ]
    flags += ["--mesh.data=1", "--engine.name=reference", "--loop.validate-every=0"]
    command = module_command("tapir", "train", "prior", "tiny", f"--data={PLACE}", f"--out={out}")
    subprocess.run([*command, *flags], check=True, env=environment)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shares = [row["data_wait_fraction"] for row in rows if "data_wait_fraction" in row][1:]
    print(f"shares of a training run: {shares}", file=sys.stderr)
    return statistics.fmean(shares)


def _stalls() -> Any:
    """A store that answers nothing for 2 s of every 10."""
    began = time.monotonic()

    def plan(number: int, method: str, path: str) -> str:
        inside = (time.monotonic() - began) % STALL_EVERY
        return f"wait {STALL_SECONDS - inside}" if inside < STALL_SECONDS else ""

    return plan


def _child(what: str, environment: dict[str, str]) -> dict[str, Any]:
    command = call_command(f"bench.stream:{what}")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{what}: {figures}", file=sys.stderr)
    return figures


def _stream(ahead: int = 64) -> Stream:
    source = TokenSource(open_store(PLACE), "train")
    return Stream(
        source, seed=0, batch=BATCH, order=ORDER, loader=LoaderConfig(readers=4, prefetch=ahead)
    )


def start() -> None:
    """Print the seconds from an address to the first batch, imports left out."""
    began = time.perf_counter()
    records, _ = next(iter(_stream()))
    assert len(records) == BATCH
    print(json.dumps({"seconds": time.perf_counter() - began}))
    sys.stdout.flush()
    os._exit(0)  # do not wait for prefetched batches


def wait() -> None:
    """Print how long a trainer with steps of STEP_SECONDS waits."""
    waits = []
    batches = iter(_stream())
    next(batches)
    began = time.perf_counter()
    for _ in range(WAIT_STEPS):
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        time.sleep(STEP_SECONDS)
    spent = time.perf_counter() - began
    quantiles = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "most": 1.0}
    figures = {name: float(np.quantile(waits, q)) for name, q in quantiles.items()}
    print(json.dumps({"share": sum(waits) / spent, **figures}))
    sys.stdout.flush()
    os._exit(0)


def whole() -> None:
    """Read the epoch and print resident sizes, sampled evenly."""
    stream, sizes = _stream(16), []
    steps = stream.order.steps(0)
    every = max(1, steps // SAMPLES)
    process, began, count = psutil.Process(), time.perf_counter(), 0
    for records, state in stream:
        count += len(records)
        if state.step % every == 0:
            sizes.append(process.memory_info().rss / 1e6)
        if state.step == steps:
            break
    seconds = time.perf_counter() - began
    third = len(sizes) // 3
    means = [float(np.mean(sizes[i * third : (i + 1) * third])) for i in range(3)]
    figures = {"records": count, "seconds": seconds, "most_mb": max(sizes)}
    figures |= {"first_third_mb": means[0], "last_third_mb": means[2]}
    print(json.dumps(figures))
    sys.stdout.flush()
    os._exit(0)
