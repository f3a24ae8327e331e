"""One machine's only rank of `bench network`: steps of several engines in turns over one link.

Runs as a program; its argument is a `Task` in JSON, its last line of output a `Figures`.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist

from bench.parity import SEED, batch_of
from bench.support.link_figures import FLOAT, MODEL, RANK, Figures, Passes, Task
from core.log import set_up_logging
from models.prior import prior_program
from parallel.compress.advisor import advise, measure_link
from parallel.compress.powersgd import MatrixShard
from parallel.config import CompressConfig, EngineConfig, EngineName, MeshConfig, OptimConfig
from parallel.engines.protocol import EngineSettings, Program
from parallel.engines.registry import build_engine
from parallel.ledger import recorded
from parallel.mesh import Group, Mesh, build_mesh
from parallel.placement import placement_of
from parallel.world import World, join_world, leave_world


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine with its compression."""

    engine: EngineName = "torch"
    rank: int = 0
    payload: Literal["fp32", "bf16"] = "fp32"
    reduces: Literal["fp32", "16-bit"] = "fp32"
    silent: bool = False
    """No gradient is reduced, to time the passes alone."""
    local: bool = False
    """Gradients are reduced over this rank alone, to time passes and factors without a link."""


CONTENDERS = {
    "plain": Contender(engine="reference"),
    "compressed": Contender(engine="reference", rank=RANK),
    "torch plain": Contender(),
    "torch compressed": Contender(rank=RANK),
    "torch plain 16": Contender(reduces="16-bit"),
    "torch compressed 16": Contender(rank=RANK, payload="bf16", reduces="16-bit"),
    "torch alone": Contender(silent=True),
    "torch local": Contender(rank=RANK, local=True),
}


def main() -> None:
    """Measure on this rank, and print the figures."""
    task = Task(**json.loads(sys.argv[1]))
    set_up_logging(1)
    torch.set_num_threads(1)
    world = join_world()
    figures = _measure(task, world)
    leave_world(world)
    print(json.dumps(asdict(figures)))


def _measure(task: Task, world: World) -> Figures:
    meshes = _meshes(world)
    program = prior_program(MODEL, SEED)
    batch = {name: value[: task.samples] for name, value in batch_of(0, MODEL).items()}
    engines = {n: _engine(CONTENDERS[n], program, meshes) for n in task.contenders}
    figures = Figures(seconds={n: [] for n in engines}, sent={})
    with recorded(meshes["torch"]) as ledger:
        for name, engine in engines.items():
            with ledger.counted() as traffic:
                engine.step([batch], 1e-4)
            here = traffic.counts.get("machine", {}).values()  # a group of this rank alone
            figures.sent[name] = traffic.bytes - sum(row["bytes"] for row in here)
    clocks = {n: _clocked(e) for n, e in engines.items() if CONTENDERS[n].silent}
    for _ in range(task.rounds):
        for name, engine in engines.items():
            world.barrier()
            began = time.perf_counter()
            for _ in range(task.steps):
                engine.step([batch], 1e-4)
            figures.seconds[name].append((time.perf_counter() - began) / task.steps)
            if name in clocks:
                figures.passes.append(clocks[name]())
        for engine in (engines[name] for name in clocks):
            figures.units = _unit_bytes(engine)
            figures.alone.append(_reduce_alone(figures.units, world))
    _advise(figures, program, meshes["torch"])
    return figures


def _meshes(world: World) -> dict[str, Mesh]:
    """Replicas for the reference; for torch machines of one rank, which the flags refuse."""
    mesh = build_mesh(MeshConfig(data=world.size), world)
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    whole = replace(mesh, machine=Group(alone, 0, 1), between=mesh.data)
    own = replace(whole, between=Group(alone, 0, 2))  # of one machine nothing would be reduced
    return {"reference": mesh, "torch": whole, "local": own}


def _engine(contender: Contender, program: Program, meshes: dict[str, Mesh]) -> Any:
    settings = EngineSettings(
        optim=OptimConfig(),
        engine=EngineConfig(name=contender.engine, reduce_precision=contender.reduces),
        compress=CompressConfig(rank=contender.rank, payload=contender.payload),
        seed=0,
    )
    mesh = meshes["local" if contender.local else contender.engine]
    engine = build_engine(program, settings, mesh)
    if contender.silent:
        engine._buckets._start = lambda unit, known: None
    return engine


def _clocked(engine: Any) -> Callable[[], Passes]:
    """Note when each unit's gradient is known; returns what tells the times of the last step."""
    ends: dict[str, float] = {}
    begins: list[float] = []
    step = engine.step

    def start(unit: Any, _known: Any) -> None:
        ends[unit.name] = time.perf_counter()

    def stepped(*arguments: Any) -> Any:
        ends.clear()
        begins[:] = [time.perf_counter()]
        return step(*arguments)

    def passes() -> Passes:
        times = list(ends.values())
        spans = [later - earlier for earlier, later in pairwise(times)]
        backward = dict(zip(ends, [0.0, *spans], strict=True))
        return Passes(forward=times[0] - begins[0], backward=backward)

    engine._buckets._start, engine.step = start, stepped
    return passes


def _unit_bytes(engine: Any) -> dict[str, int]:
    units = [unit for unit in reversed(engine._units) if unit.parts]
    return {unit.name: FLOAT * sum(part.padded for part in unit.parts) for unit in units}


def _reduce_alone(units: dict[str, int], world: World) -> float:
    """Seconds of the reductions that the hook starts, in its order."""
    flats = [torch.ones(count // FLOAT, device=world.device) for count in units.values()]
    world.barrier()
    began = time.perf_counter()
    works = [dist.all_reduce(flat, async_op=True) for flat in flats]
    for work in works:
        work.wait()
    return time.perf_counter() - began


def _advise(figures: Figures, program: Program, mesh: Mesh) -> None:
    """Fill in the link and the advisor's break-even."""
    named = [(f"{x.name}.{n}", p) for x in program.layers for n, p in x.build().named_parameters()]
    shards = [
        MatrixShard(name=n, rows=placement_of(p).rows, columns=p.shape[1])
        for n, p in named
        if n.endswith(program.compressed)
    ]
    figures.parameters = sum(p.numel() for _, p in named)
    others = figures.parameters - sum(s.rows * s.columns for s in shards)
    assert mesh.data.handle is not None, "two machines have a group"
    device = mesh.world.device
    link = measure_link(mesh.data.handle, device)
    advice = advise(shards, others, 1, link, [RANK / MODEL.dim], device)[0]
    figures.bandwidth, figures.latency = link.bandwidth, link.latency
    figures.break_even = advice.break_even
    for shard in shards:
        unit = shard.name.partition(".")[0]
        saved = shard.rows * shard.columns - RANK * (shard.rows + shard.columns)
        if unit in figures.units:
            sent = figures.factored.get(unit, figures.units[unit])
            figures.factored[unit] = sent - FLOAT * saved


if __name__ == "__main__":
    main()
