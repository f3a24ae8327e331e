"""What this machine really reaches: one run that measures the constants of `cpu` plans.

Matmuls at a few sizes and a copy of memory give rates, all-reduces of two sizes between two ranks
give the link; steps of a small model with few and many micro-batches give what Python costs a layer
and a step. Steps of a wider one give shares: alone, that of the matmuls' rate which a whole step
reaches; a replica a core, what a core keeps of it while others work; as two tensor ranks, what
collectives between layers reach of the link.
"""

import json
import math
import os
import time
from collections.abc import Callable
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
from parallel.precision import choose_matmul_precision
from parallel.world import join_world, leave_world
from planning.hardware import KNOWN, Hardware
from planning.step import estimate
from planning.trial import time_steps
from training.config import LoopConfig, PriorTrain

SIZES = (256, 512, 1024)
"""Sides of the square matmuls."""
COPIED = 2**27
"""Bytes of the copy that tells the memory's rate."""
ROUNDS, STEPS, TURNS = 7, 8, 3
NARROW = PriorConfig(
    dim=64, heads=4, layers=6, text_length=16, text_vocabulary=64, image_vocabulary=64, grid=4
)
WIDE = PriorConfig(
    dim=256, heads=4, layers=4, text_length=24, text_vocabulary=512, image_vocabulary=64, grid=8
)
FEW, MANY = 1, 8
"""Micro-batches a step."""
EACH = 16
"""Pictures a step of a replica of the wide model."""
MOST_RANKS = 16
"""Ranks that calibration starts."""
_LEAST_SHARE = 0.02


def calibrate(precision: str = "fp32") -> dict[str, float]:
    """Measure this machine; returns fields of `Hardware`.

    Units: operations, bytes and seconds; a rate is that of one core.
    """
    torch.set_num_threads(1)
    choose_matmul_precision("auto")
    rates = {
        "half_flops": max(_matmul_rate(size, torch.bfloat16) for size in SIZES),
        "full_flops": max(_matmul_rate(size, torch.float32) for size in SIZES),
        "bandwidth": _memory_rate(),
    }
    LOG.info("one core: %s", ", ".join(f"{n} {v / 1e9:.1f}e9" for n, v in rates.items()))
    link = _link()
    LOG.info("two ranks: %.2f GB/s, latency %.2f ms", link["link"] / 1e9, 1e3 * link["latency"])
    found = {
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
    return {**found, **_steps(replace(KNOWN["cpu"], **found), precision)}


def _steps(hardware: Hardware, precision: str) -> dict[str, float]:
    """Overheads from a narrow model, the sustained share of matmuls from a wide one."""
    one = EngineConfig(precision=precision)  # type: ignore[arg-type]
    narrow = PriorTrain(model=NARROW, loop=LoopConfig(batch=MANY), engine=one)
    many = replace(narrow, engine=replace(one, accumulate=MANY))
    few, more = _typical(narrow), _typical(many)
    layers = NARROW.layers + 2
    overhead = max(more - few, 0.0) / ((MANY - FEW) * layers)
    step = max(few - layers * overhead, 0.0)
    two = replace(narrow, mesh=MeshConfig(data=2))
    engine = EngineConfig(name="deepspeed_zero", precision=one.precision)
    extra = max(_typical(replace(two, engine=engine)) - _typical(two), 0.0)
    found = {"overhead": overhead, "step_overhead": step, "engine_overhead": extra}
    LOG.info(
        "Python: %.2f ms a layer, %.1f ms a step, %.1f ms more with DeepSpeed",
        *(1e3 * overhead, 1e3 * step, 1e3 * extra),
    )
    ways = runs_for_shares(hardware.cores, one, engine)
    turns = [{name: _typical(way) for name, way in ways.items()} for _ in range(TURNS)]
    for name, way in ways.items():
        measured = min(turn[name] for turn in turns)
        found[name] = share_of(name, way, replace(hardware, **found), measured)
        LOG.info("%s: %.0f%%", name, 100 * found[name])
    return found


def runs_for_shares(
    cores: int, one: EngineConfig, deepspeed: EngineConfig
) -> dict[str, PriorTrain]:
    """The runs from whose steps shares are found, each with those before it."""
    alone = PriorTrain(model=WIDE, loop=LoopConfig(batch=EACH), engine=one)
    if cores == 1:
        return {"sustained": alone}
    count = min(cores, MOST_RANKS)
    every = replace(alone, loop=LoopConfig(batch=EACH * count), mesh=MeshConfig(data=count))
    split = replace(alone, mesh=MeshConfig(tensor=2), engine=deepspeed)
    return {"sustained": alone, "together": every, "joined": split}


def share_of(name: str, way: PriorTrain, hardware: Hardware, measured: float) -> float:
    """The share of that name at which the step is predicted to take as long as it does."""
    return _solved(lambda s: estimate(way, replace(hardware, **{name: s})).seconds, measured)


def _typical(settings: PriorTrain) -> float:
    """The least of some steps: other work on the machine only adds to them."""
    return min(time_steps(settings, STEPS))


def _solved(predicted: Callable[[float], float], measured: float) -> float:
    """The share at which the predicted step, which falls with it, is the measured one."""
    low, high = _LEAST_SHARE, 1.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        slow = predicted(middle) > measured
        low, high = (middle, high) if slow else (low, middle)
    return math.sqrt(low * high)


def _matmul_rate(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(a, b))


def _memory_rate() -> float:
    """Bytes read and written a second."""
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
        launch("planning.calibrate:link_rank", payload, 2, ["torch", "torch.distributed"])
        found: dict[str, float] = json.loads(Path(folder, "link.json").read_text())
        return found


def link_rank(payload: str) -> None:
    """Time all-reduces on this rank; rank 0 writes link.json."""
    world = join_world()
    assert world.group is not None, "calibration starts two ranks"
    dist.barrier()
    link = measure_link(world.group)
    if world.rank == 0:
        found = {"link": link.bandwidth, "latency": link.latency / 2}
        Path(json.loads(payload)["out"], "link.json").write_text(json.dumps(found))
    leave_world(world)
