"""Measure the constants of `tapir plan --gpu cpu` on this machine.

Square matmuls and a copy of memory give rates; all-reduces of two sizes between two ranks give the
link. Steps of a narrow model with few and many micro-batches give Python's overhead per layer and
per step. Steps of a wide model give the rest: on one rank, the fraction of the matmul rate that a
whole step reaches; with one replica per core, the fraction of it that a core keeps while the others
work; on two tensor ranks with many micro-batches, the latency of a collective between layers (ranks
arrive at different times and have to be woken), with one micro-batch, the fraction of the link that
collectives reach.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from cluster.launcher import launch
from core.log import LOG
from models.config import PriorConfig
from parallel.compress.advisor import measure_link
from parallel.config import EngineConfig, MeshConfig
from parallel.device import CPU
from parallel.precision import set_numerics
from parallel.world import join_world, leave_world
from planning.calibration.trial import time_steps
from planning.estimate.hardware import KNOWN, Hardware
from planning.estimate.step_time import estimate
from training.config import LoopConfig, PriorTrain

SIZES = (256, 512, 1024)
"""Sides of the square matmuls."""
COPIED = 2**27
"""Bytes of the copy that measures the memory's bandwidth."""
ROUNDS, STEPS, TURNS = 7, 8, 5
NARROW = PriorConfig(
    dim=64, heads=4, layers=6, text_length=16, text_vocabulary=64, image_vocabulary=64, grid=4
)
WIDE = PriorConfig(
    dim=256, heads=4, layers=4, text_length=24, text_vocabulary=512, image_vocabulary=64, grid=8
)
FEW, MANY = 1, 8
"""Micro-batches a step."""
EACH = 16
"""Samples per step of a replica of the wide model."""
MOST_RANKS = 16
"""Maximum ranks that calibration starts."""
RANGES = {
    "sustained": (0.02, 1.0),
    "together": (0.02, 1.0),
    "link_latency": (1e-6, 0.1),
    "joined": (0.02, 1.0),
}
"""Search range of each constant that is solved from steps: fractions, and seconds of a hop."""
PASSES = 6
"""Rounds over those constants, since they depend on one another."""
BESIDE = {"link_latency": "joined"}
"""Constant -> the run whose step time is subtracted: the same bytes in fewer collectives."""


def calibrate(precision: str = "fp32") -> dict[str, float]:
    """Measure this machine; returns fields of `Hardware`.

    Units: operations, bytes and seconds; rates of one core.
    """
    torch.set_num_threads(1)
    set_numerics(CPU, "auto")
    rates = {
        "half_flops": max(_matmul_rate(size, torch.bfloat16) for size in SIZES),
        "full_flops": max(_matmul_rate(size, torch.float32) for size in SIZES),
        "bandwidth": _memory_rate(),
    }
    LOG.info("one core: %s", ", ".join(f"{n} {v / 1e9:.1f}e9" for n, v in rates.items()))
    link = _link()
    LOG.info("two ranks: %.2f GB/s, latency %.2f ms", link["link"] / 1e9, 1e3 * link["latency"])
    measured = {
        **rates,
        "streamed": 1.0,
        "link": link["link"],
        "network": link["link"],
        "link_latency": link["latency"],
        "network_latency": link["latency"],
        "launch": 0.0,
        "cores": os.cpu_count() or 1,
        "memory": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }
    return {**measured, **_steps(KNOWN["cpu"].with_constants(measured), precision)}


def _steps(hardware: Hardware, precision: str) -> dict[str, float]:
    """Constants from whole steps: the runs take turns, and the shortest step of each counts."""
    one = EngineConfig(precision=precision)  # type: ignore[arg-type]
    engine = replace(one, name="deepspeed_zero")
    narrow, wide = runs_for_overheads(one, engine), runs_for_steps(hardware.cores, one, engine)
    times: dict[str, list[float]] = {}
    for turn in range(TURNS):
        LOG.info("steps of %d meshes, turn %d of %d", len(narrow | wide), turn + 1, TURNS)
        for name, settings in (narrow | wide).items():
            times.setdefault(name, []).extend(time_steps(settings, STEPS))
    least = {name: min(seconds) for name, seconds in times.items()}
    overhead = overheads(least)
    LOG.info(
        "Python: %.2f ms a layer, %.1f ms a step, %.1f ms more with DeepSpeed",
        *(1e3 * value for value in overhead.values()),
    )
    solved = constants(wide, least, hardware.with_constants(overhead))
    LOG.info("%s", ", ".join(f"{name} {value:.3g}" for name, value in solved.items()))
    for name in at_bounds(solved):
        LOG.warning("%s is on its bound; calibrate again while nothing else runs", name)
    return overhead | solved


def at_bounds(solved: Mapping[str, float]) -> list[str]:
    """Constants on a bound of their range, which no step can determine; a fraction may be 1."""

    def inside(name: str, value: float) -> bool:
        low, high = RANGES[name]
        return 1.01 * low < value and (high == 1.0 or value < high / 1.01)

    return [name for name, value in solved.items() if not inside(name, value)]


def runs_for_overheads(one: EngineConfig, deepspeed: EngineConfig) -> dict[str, PriorTrain]:
    """Runs whose steps take mostly Python's time."""
    few = PriorTrain(model=NARROW, loop=LoopConfig(global_batch_size=MANY), engine=one)
    many = replace(few, engine=replace(one, gradient_accumulation_steps=MANY))
    two = replace(few, mesh=MeshConfig(data=2))
    return {"few": few, "many": many, "two": two, "engine": replace(two, engine=deepspeed)}


def overheads(least: Mapping[str, float]) -> dict[str, float]:
    """Python's seconds per layer, per step, and DeepSpeed's on top, from those runs' steps."""
    layers = NARROW.layers + 2
    layer = max(least["many"] - least["few"], 0.0) / ((MANY - FEW) * layers)
    return {
        "overhead": layer,
        "step_overhead": max(least["few"] - layers * layer, 0.0),
        "engine_overhead": max(least["engine"] - least["two"], 0.0),
    }


def runs_for_steps(cores: int, one: EngineConfig, deepspeed: EngineConfig) -> dict[str, PriorTrain]:
    """Constant -> the run that determines it, given the constants before it."""
    alone = PriorTrain(model=WIDE, loop=LoopConfig(global_batch_size=EACH), engine=one)
    if cores == 1:
        return {"sustained": alone}
    count = min(cores, MOST_RANKS)
    every = replace(
        alone, loop=LoopConfig(global_batch_size=EACH * count), mesh=MeshConfig(data=count)
    )
    split = replace(alone, mesh=MeshConfig(tensor=2), engine=deepspeed)
    small = replace(split, engine=replace(deepspeed, gradient_accumulation_steps=MANY))
    return {"sustained": alone, "together": every, "link_latency": small, "joined": split}


def constants(
    runs: Mapping[str, PriorTrain], least: Mapping[str, float], hardware: Hardware
) -> dict[str, float]:
    """Solve the constants for which each run's predicted step time equals the measured one."""
    solved: dict[str, float] = {}
    for name, settings in PASSES * list(runs.items()):
        less = BESIDE.get(name)

        def predicted(value: float) -> float:
            there = hardware.with_constants(solved | {name: value})  # noqa: B023 - called at once
            taken = estimate(runs[less], there).seconds if less else 0.0  # noqa: B023
            return estimate(settings, there).seconds - taken  # noqa: B023

        measured = least[name] - (least[less] if less else 0.0)
        solved[name] = _solved(predicted, measured, *RANGES[name])
    return solved


def _solved(predicted: Callable[[float], float], measured: float, low: float, high: float) -> float:
    """Bisect for the value at which a monotonic prediction equals the measurement."""
    rises = predicted(high) > predicted(low)
    for _ in range(30):
        middle = math.sqrt(low * high)
        short = predicted(middle) < measured
        low, high = (middle, high) if short == rises else (low, middle)
    return math.sqrt(low * high)


def _matmul_rate(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(a, b))


def _memory_rate() -> float:
    """Bytes read and written per second."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    return 2 * COPIED / _best(lambda: target.copy_(source))


def _best(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _link() -> dict[str, float]:
    with TemporaryDirectory() as folder:
        payload = json.dumps({"out": folder})
        launch(
            "planning.calibration.calibrate:link_rank", payload, 2, ["torch", "torch.distributed"]
        )
        figures: dict[str, float] = json.loads(Path(folder, "link.json").read_text())
        return figures


def link_rank(payload: str) -> None:
    """Time all-reduces on this rank; rank 0 writes link.json."""
    world = join_world()
    assert world.group is not None, "calibration starts two ranks"
    dist.barrier()
    link = measure_link(world.group, world.device)
    if world.rank == 0:
        figures = {"link": link.bandwidth, "latency": link.latency / 2}
        Path(json.loads(payload)["out"], "link.json").write_text(json.dumps(figures))
    leave_world(world)
