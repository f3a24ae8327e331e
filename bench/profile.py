"""Cost of the always-on profile: paired steps with and without it, in the same process.

The tiny prior is trained by the real loop on a batch of 8, with its rows, TensorBoard and guards:
by one process, and by two ranks under deepspeed_zero, whose CPU times are added up. A keyed draw
chooses which step of a pair has the profile; 50 pairs later it is the other one, so that work every
10 steps (rows) and every 100 (comparisons of replicas) falls on both alike. A share is the mean
difference of CPU time over the mean without; the interval is 1.96 standard errors wide on either
side.
"""

import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.support.rows import bench_row
from bench.support.sizes import sized
from bench.support.tokens import make_tokens
from checkpoint.config import CheckpointConfig
from cluster.launcher import launch
from core.config import from_json, to_json
from core.heartbeat import Heart
from core.keys import key_fraction
from core.log import Meter
from core.memory import keep_freed_memory
from parallel.config import EngineConfig, MeshConfig
from parallel.engines.registry import modules_of
from parallel.ledger import recorded
from parallel.mesh import build_mesh
from parallel.world import join_world, leave_world
from training.config import LoopConfig, PriorTrain
from training.launch import PRELOAD
from training.presets import prior_tiny
from training.stages import make_task
from training.trainer import Run

WARM, PAIRS, BATCH = sized(20, 2), sized(400, 6), 8
BLOCK = 50
"""Pairs after which the order is reversed."""
BOUND = 2.0
"""Percent that the upper end of the interval must stay below."""
CASES = {
    "one process": ("reference", 1),
    **sized({"two ranks, deepspeed_zero": ("deepspeed_zero", 2)}, {}),
}


def run() -> list[dict[str, Any]]:
    """One row a case, in percent; ratio = the bound over the upper end of the interval."""
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        tokens = make_tokens(Path(name), 600, 2)
        for i, (case, (engine, ranks)) in enumerate(CASES.items()):
            settings = _settings(tokens, Path(name, str(i)), engine, ranks)
            pairs = _pairs(settings, Path(name, f"pairs-{i}"), ranks)
            mean, low, high = interval(pairs)
            without = statistics.fmean(off for _, off in pairs)
            rows.append(
                bench_row(
                    f"profile, {case}: {len(pairs)} pairs",
                    mean,
                    "% of CPU",
                    f"{1000 * without:.1f} ms a step without, bound {BOUND:g}%",
                    [low, high],
                    ratio=BOUND / max(high, 1e-9),
                )
            )
    return rows


def interval(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Mean, lower and upper end of the cost in percent, of (with, without) in seconds."""
    without = statistics.fmean(off for _, off in pairs)
    differences = [on - off for on, off in pairs]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5
    low, middle, high = (100 * value / without for value in (mean - half, mean, mean + half))
    return middle, low, high


def with_first(pair: int) -> bool:
    """True if the first step of a pair has the profile."""
    block, place = divmod(pair, BLOCK)
    return (key_fraction("profile", block // 2, place) < 0.5) != bool(block % 2)


def _settings(tokens: str, out: Path, engine: str, ranks: int) -> PriorTrain:
    steps = WARM + 2 * PAIRS
    return replace(
        prior_tiny(),
        data=tokens,
        out=out,
        loop=LoopConfig(steps=steps + 1, global_batch_size=BATCH, validate_every=0),
        checkpoint=CheckpointConfig(every=10**6),
        mesh=MeshConfig(data=ranks),
        engine=EngineConfig(name=engine, precision="bf16"),  # type: ignore[arg-type]
    )


def _pairs(settings: PriorTrain, out: Path, ranks: int) -> list[tuple[float, float]]:
    out.mkdir()
    payload = json.dumps({"settings": to_json(settings), "out": str(out)})
    preload = [*PRELOAD, *modules_of(settings.engine.name, False), "bench.profile"]
    launch("bench.profile:measure_rank", payload, ranks, preload)
    per_rank = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return [(sum(p[0] for p in row), sum(p[1] for p in row)) for row in zip(*per_rank, strict=True)]


def measure_rank(payload: str) -> None:
    """Train on this rank, and write its CPU seconds, (with, without) for every pair."""
    body = json.loads(payload)
    settings = from_json(PriorTrain, body["settings"])
    keep_freed_memory()
    world = join_world()
    mesh, heart = build_mesh(settings.mesh, world), Heart(world.rank)
    with recorded(mesh, heart) as ledger:
        active = Run("prior", make_task("prior", settings, mesh), settings, mesh, ledger, heart)
        active.folder.begin(0)
        active.profile.open(0)
        pairs = _measure(active)
        active.close()
    Path(body["out"], f"rank-{world.rank}.json").write_text(json.dumps(pairs))
    leave_world(world)


def _measure(active: Run) -> list[tuple[float, float]]:
    steps, meter = active.steps(), Meter("bench", 0, None)

    def spent(on: bool) -> float:
        if on:
            active.profile.attach()
        else:
            active.profile.detach()
        began = time.process_time()
        result, cost = next(steps)
        active.report(result, cost, meter)
        return time.process_time() - began

    for i in range(WARM):
        spent(i % 2 == 0)
    pairs = []
    for i in range(PAIRS):
        first = with_first(i)
        seconds = {on: spent(on) for on in (first, not first)}
        pairs.append((seconds[True], seconds[False]))
    return pairs
