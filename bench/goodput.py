"""Goodput of the paper's 12B run on 1,024 GPUs with three failures a day, by simulation.

Measured here, for a rank's share of the checkpoint's bytes: how long a save blocks training, how
long it takes to write, how fast it is verified and read; and, as a row of its own, the seconds from
the SIGKILL of one of 8 ranks to the next trained step. `ASSUMED` is printed with the rows.
"""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.support.children import child_environment, module_command
from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.tokens import DATA, make_tokens
from checkpoint.format import StateSlice
from checkpoint.reader import open_checkpoint
from checkpoint.saver import Saver
from core.heartbeat import read_beats
from core.keys import keyed_rng
from core.storage.store import FolderStore
from planning.checkpoint_size import checkpoint_bytes
from planning.config import settings_of

GPUS, FAILURES_A_DAY = 1024, 3.0
"""Source: 7.9 hours between failures of a job on 1,024 GPUs, arXiv 2410.21680."""
REPLACEMENT = 900.0
"""Seconds until a failed node is replaced and the job begins to start; assumed."""
GPU_START = 300.0
"""Seconds from there to the first step, without reading the checkpoint; assumed."""
ASSUMED = (
    f"{FAILURES_A_DAY:g} failures a day on {GPUS} GPUs, at any time, also during a restart "
    "(arXiv 2410.21680: 7.9 h between failures)",
    f"{REPLACEMENT:.0f} s to replace a node after every failure (assumed; spare nodes are faster)",
    f"{GPU_START:.0f} s from there to the first step: imports, CUDA, NCCL, compilation (assumed; "
    "not measured on a GPU cluster)",
    "all ranks write and read their shares at once as fast as one does on this machine's disk",
    "no step is slower than another, and every failure is noticed at once",
)
DAY, DAYS = 86_400.0, sized(365 * 20, 30)
INTERVALS = sized((30, 60, 120, 300, 600, 1200, 1800, 3600, 7200), (60,))
KILLS = sized(3, 1)
FOLDER = cache("goodput")
SIDES = sized((2, 2, 2), (1, 2, 1))
"""Tensor, pipeline and data ranks of the run that is killed."""
RANKS = math.prod(SIDES)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds on each rank."""

    hold: float
    """Seconds that a save blocks training."""
    write: float
    """Seconds until a save is written; a failure before then resumes from the one before."""
    restart: float
    """Seconds from a failure to the next trained step, if no other failure comes."""


def run() -> list[dict[str, Any]]:
    """One row an interval, and the seconds of a restart."""
    restarts = measured_restarts()
    restart = statistics.median(restarts)
    parts = checkpoint_bytes(settings_of("paper_12b"))
    share = sized(sum(parts.values()) / GPUS, 1e6)
    hold, write, read = _measured_save(share)
    costs = Costs(hold=hold, write=write, restart=REPLACEMENT + GPU_START + read)
    sizes = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    print(f"a checkpoint in GB: {sizes}; {share / 1e6:.0f} MB a rank: {costs}", file=sys.stderr)
    print("\n".join(f"assumed: {text}" for text in ASSUMED), file=sys.stderr)
    rows = [
        bench_row(
            f"SIGKILL of one of {RANKS} ranks to the next trained step",
            restart,
            "s",
            "15 s",
            [15 / one for one in restarts],
            ratio=15 / restart,
        )
    ]
    for interval in INTERVALS:
        shares = [simulate(costs, float(interval), seed) for seed in range(5)]
        rows.append(
            bench_row(
                f"goodput, a checkpoint every {interval} s",
                statistics.mean(shares),
                "share",
                "0.95",
                shares,
                ratio=statistics.mean(shares) / 0.95,
            )
        )
    return rows


def simulate(costs: Costs, interval: float, seed: int) -> float:
    """Share of the wall time spent on steps that no failure undoes."""
    draws = keyed_rng(seed, int(interval), "goodput")
    now = useful = 0.0
    while now < DAYS * DAY:
        alive = draws.exponential(DAY / FAILURES_A_DAY)
        now += alive
        trained = alive - costs.restart  # less than nothing: it failed again before its first step
        cycle = interval + costs.hold
        useful += max(0, math.floor((trained - costs.write) / cycle)) * interval
    return useful / now


def expected(costs: Costs, interval: float) -> float:
    """What `simulate` tends to, for exponential times between failures.

    A save at a time t after a failure is kept with probability exp(-t / mean), and the k-th one is
    whole at t = restart + k * (interval + hold) + write: the sum over k is a geometric series.
    """
    mean = DAY / FAILURES_A_DAY
    lost = math.exp(-(costs.restart + costs.write) / mean)
    return lost * (interval / mean) / math.expm1((interval + costs.hold) / mean)


def measured_restarts() -> list[float]:
    """Seconds from the SIGKILL of one of the ranks of SIDES to the next logged step."""
    tokens = make_tokens(FOLDER / "data", *DATA)
    out = FOLDER / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = module_command("tapir", "train", "prior", "tiny", f"--data={tokens}")
    command += [
        f"--out={out}",
        "--loop.steps=100000",
        "--loop.log-every=1",
        "--loop.global-batch-size=16",
    ]
    command += ["--loop.validate-every=0", "--checkpoint.every=5"]
    names = ("tensor", "pipeline", "data")
    command += [f"--mesh.{name}={n}" for name, n in zip(names, SIDES, strict=True)]
    command += ["--engine.name=deepspeed_pipe", "--engine.gradient-accumulation-steps=2"]
    command += ["--model.heads=4", "--supervisor.backoff-seconds=0.1"]
    environment = {**child_environment(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    try:
        return [_kill_one(process.pid, out) for _ in range(KILLS)]
    finally:
        process.kill()
        process.wait()


def _kill_one(launcher: int, out: Path) -> float:
    """Kill one rank; returns the seconds until the restarted ranks log a step."""
    start = len(_rows(out))
    _until(lambda: len(_rows(out)) > start + 12)
    session = next(Path(tempfile.gettempdir()).glob(f"tapir-ranks-{launcher}-*"))
    folder = next(path for path in session.iterdir() if path.is_dir())
    ranks = [beat.pid for beat in read_beats(folder, RANKS)]
    began = time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    before = set(_rows(out))
    _until(lambda: _rows(out)[-1] not in before)
    return time.monotonic() - began


def _measured_save(share: float) -> tuple[float, float, float]:
    """Seconds that a save of a rank's share blocks training, takes to write and to read back."""
    data = torch.zeros(int(share / 4)).normal_()
    part = StateSlice(name="w", kind="master", shape=(data.numel(),), start=0, data=data)
    store = FolderStore(FOLDER / "checkpoints")
    saver = Saver(store, 0, lambda text: [text], True)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        held_up = saver.save("step-1", [part], {}, lambda: None)
        saver.wait()
        written = time.perf_counter() - began
        began = time.perf_counter()
        open_checkpoint(f"{store.url}/step-1").tensor("w", "master")
        times.append((held_up, written, time.perf_counter() - began))
    shutil.rmtree(store.root)
    hold, write, read = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return hold, write, read


def _rows(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.endswith("}") and "split" not in json.loads(line)]


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the run did not get on")
        time.sleep(0.01)
