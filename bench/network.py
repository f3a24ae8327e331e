"""Steps a second with and without compression over a slow link, and the advisor's break-even.

Two namespaces are two machines with one rank each; tbf limits the link. The model has 20M
parameters and short samples, so that gradients dominate as they do between machines.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch

from bench.parity import SEED, batch_of
from bench.support.machines import Machines, two_machines
from bench.support.rows import bench_row
from bench.support.sizes import sized
from core.log import set_up_logging
from models.config import PriorConfig
from models.prior import prior_program
from parallel.compress.advisor import advise, measure_link
from parallel.compress.powersgd import MatrixShard
from parallel.config import CompressConfig, EngineConfig, MeshConfig, OptimConfig
from parallel.engines.protocol import EngineSettings
from parallel.engines.registry import build_engine
from parallel.mesh import build_mesh
from parallel.placement import placement_of
from parallel.world import join_world, leave_world

MODEL = PriorConfig(
    dim=sized(512, 128),
    heads=8,
    layers=sized(6, 1),
    text_length=6,
    text_vocabulary=512,
    image_vocabulary=512,
    grid=4,
)
RANK = MODEL.dim // 8
SLOW = sized(100.0, 1000.0)
"""Megabits a second."""
SWEEP = sized((300.0, 600.0, 900.0, 1300.0, 2000.0), (300.0, 2000.0))
STEPS, ROUNDS = sized(4, 1), sized(3, 1)
PORTS = iter(range(29_700, 29_990))


def run() -> list[dict[str, Any]]:
    """Rows: steps/s at 100 Mbit/s, then the advisor's break-even against the measured one."""
    with two_machines() as machines:
        machines.shape(SLOW)
        slow = _measure(machines)
        plain, compressed = slow["plain"], slow["compressed"]
        ratios = [p / c for p, c in zip(plain, compressed, strict=True)]
        rows = [
            bench_row(
                f"{SLOW:g} Mbit/s, {slow['parameters'] / 1e6:.1f}M parameters, rank {RANK}",
                1 / statistics.median(compressed),
                "steps/s",
                f"uncompressed {1 / statistics.median(plain):.3f} steps/s",
                ratios,
            )
        ]
        rows.append(_break_even(machines))
        return rows


def _break_even(machines: Machines) -> dict[str, Any]:
    """Sweep the rate; interpolate the payload bandwidth at which compression stops to pay."""
    points = []
    for megabits in SWEEP:
        machines.shape(megabits)
        figures = _measure(machines)
        gain = statistics.median(figures["plain"]) - statistics.median(figures["compressed"])
        points.append((figures["bandwidth"], gain, figures["break_even"]))
        print(f"{megabits:g} Mbit/s: {points[-1]}", file=sys.stderr)
    measured = _crossing([(1 / bandwidth, gain) for bandwidth, gain, _ in points])
    advised = statistics.median(point[2] for point in points)
    return bench_row(
        f"advisor's break-even bandwidth, rank {RANK}",
        advised / 1e6,
        "MB/s",
        f"measured {measured / 1e6:.0f} MB/s",
        [point[2] / measured for point in points],
        ratio=advised / measured,
    )


def _crossing(points: list[tuple[float, float]]) -> float:
    """Bandwidth at which a least-squares line of gain over seconds a byte crosses zero."""
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    zero = x.mean() - y.mean() / slope
    return 1 / float(zero)


def _measure(machines: Machines) -> dict[str, Any]:
    output = machines.run(["bench.network"], 1, next(PORTS))[0]
    body: dict[str, Any] = json.loads(output.splitlines()[-1])
    return body


def _rank() -> None:
    """One node's rank: interleaved steps with and without compression, then the advisor."""
    set_up_logging(1)
    torch.set_num_threads(1)
    world = join_world()
    mesh = build_mesh(MeshConfig(data=world.size), world)
    program = prior_program(MODEL, SEED)
    engines = {}
    for name, rank in (("plain", 0), ("compressed", RANK)):
        settings = EngineSettings(
            optim=OptimConfig(), engine=EngineConfig(), compress=CompressConfig(rank=rank), seed=0
        )
        engines[name] = build_engine(program, settings, mesh)
    batch = {name: value[:2] for name, value in batch_of(0, MODEL).items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.step([batch], 1e-4)
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            world.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                engine.step([batch], 1e-4)
            seconds[name].append((time.perf_counter() - began) / STEPS)
    named = [(f"{x.name}.{n}", p) for x in program.layers for n, p in x.build().named_parameters()]
    shards = [
        MatrixShard(name=n, rows=placement_of(p).rows, columns=p.shape[1])
        for n, p in named
        if n.endswith(program.compressed)
    ]
    total = sum(p.numel() for _, p in named)
    others = total - sum(s.rows * s.columns for s in shards)
    assert mesh.data.handle is not None, "two nodes have a group"
    link = measure_link(mesh.data.handle, world.device)
    advice = advise(shards, others, 1, link, [RANK / MODEL.dim], world.device)[0]
    body = {
        **seconds,
        "bandwidth": link.bandwidth,
        "break_even": advice.break_even,
        "parameters": total,
    }
    leave_world(world)
    print(json.dumps(body))


if __name__ == "__main__":
    _rank()
