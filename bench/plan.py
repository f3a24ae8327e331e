"""Accuracy of `tapir plan --gpu cpu` on this machine: six meshes predicted, then measured.

One calibration run comes first; nothing of the measured steps goes back into it. Meshes run in
turns for several rounds; a round counts its fastest step, as calibration does, because other work
on the machine only adds time. A row's ratio is the predicted over the measured step time.
"""

import itertools
from typing import Any

from bench.support.rows import bench_row
from bench.support.sizes import sized, tiny
from models.config import PriorConfig
from parallel.config import EngineConfig, EngineName, MeshConfig
from planning.calibration.calibrate import calibrate
from planning.calibration.trial import time_steps
from planning.estimate.hardware import KNOWN
from planning.estimate.step_time import estimate
from training.config import LoopConfig, PriorTrain

MODEL = PriorConfig(
    dim=256, heads=4, layers=6, text_length=24, text_vocabulary=512, image_vocabulary=64, grid=8
)
BATCH, ROUNDS, STEPS = 32, sized(5, 1), sized(6, 2)


def _run(mesh: MeshConfig, name: EngineName = "reference", accumulate: int = 1) -> PriorTrain:
    engine = EngineConfig(name=name, gradient_accumulation_steps=accumulate)
    return PriorTrain(
        model=MODEL, loop=LoopConfig(global_batch_size=BATCH), mesh=mesh, engine=engine
    )


_MESHES = {
    "DP2": _run(MeshConfig(data=2)),
    "PP2, 4 micro-batches": _run(MeshConfig(pipeline=2), "deepspeed_pipe", 4),
    "TP2 x PP2, 4 micro-batches": _run(MeshConfig(tensor=2, pipeline=2), "deepspeed_pipe", 4),
    "1 rank": _run(MeshConfig()),
    "TP2, 16 micro-batches": _run(MeshConfig(tensor=2), "deepspeed_zero", 16),
    "TP4, 8 micro-batches": _run(MeshConfig(tensor=4), "deepspeed_zero", 8),
}
"""A rank alone, replicas, stages, tensor ranks and both; chosen so that neighbours' measured steps
are at least a tenth apart, for steps of one mesh vary by as much on a virtual machine."""
MESHES = sized(_MESHES, {name: _MESHES[name] for name in ("DP2", "1 rank")})


def run() -> list[dict[str, Any]]:
    """One row a mesh, then whether the order is right, and how good the chosen mesh is."""
    hardware = KNOWN["cpu"] if tiny() else KNOWN["cpu"].with_constants(calibrate())
    predicted = {name: estimate(mesh, hardware).seconds for name, mesh in MESHES.items()}
    rounds: dict[str, list[float]] = {name: [] for name in MESHES}
    for _ in range(ROUNDS):
        for name, mesh in MESHES.items():
            rounds[name].append(min(time_steps(mesh, STEPS)))
    measured = {name: min(seconds) for name, seconds in rounds.items()}
    rows = []
    for name, seconds in rounds.items():
        ratios = sorted(predicted[name] / one for one in seconds)
        unit, base = "s a step", f"measured {measured[name]:.3g} s"
        rows.append(bench_row(name, predicted[name], unit, base, ratios))
    chosen = min(predicted, key=lambda name: predicted[name])
    best = min(measured.values())
    ratios = sorted(best / one for one in rounds[chosen])
    rows.append(
        bench_row(f"chosen: {chosen}", measured[chosen], "s a step", "best measured", ratios)
    )
    pairs = list(itertools.combinations(MESHES, 2))
    right = sum((predicted[a] < predicted[b]) == (measured[a] < measured[b]) for a, b in pairs)
    name, unit = "pairs in the right order", f"of {len(pairs)}"
    return [*rows, bench_row(name, right, unit, "all", [right / len(pairs)])]
