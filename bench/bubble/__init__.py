"""Share of a step in which a pipeline's stages wait, beside what the schedule itself says.

PP4: blocks that sleep a known time forward, for gradients of inputs and for those of weights, so
that four stages do not share two cores. PP2: a prior's blocks, on a core each, 1F1B or
interleaved. What a schedule says is played with the measured seconds of each single pass, which
vary on a CPU.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from bench.parity import OPTIM, PRELOAD, SEED
from bench.support.rows import Row, bench_row
from bench.support.sizes import sized
from cluster.launcher import launch
from core.config import from_json
from models.config import PriorConfig
from models.prior import prior_program
from parallel.config import CompressConfig, EngineConfig, MeshConfig
from parallel.engines.fsdp.pipeline import Pipeline, chunks_of
from parallel.engines.protocol import Batch, EngineSettings, Layer, Losses, Program
from parallel.engines.registry import build_engine
from parallel.mesh import Mesh, build_mesh
from parallel.pipelines.schedules import Schedule
from parallel.tensor.halves import wants_input, wants_weights
from parallel.world import join_world, leave_world
from planning.estimate.overlapped.schedules import Pass, order, play

ROUNDS = sized(3, 1)
MICRO_BATCHES = sized(8, 4)
SECONDS = sized(0.06, 0.003)
"""That a sleeping block takes forward, and for each half of its backward pass."""
SLEEPERS = 8
WIDTH = 64
MODEL = PriorConfig(
    dim=sized(512, 48),
    heads=8,
    layers=6,
    text_length=16,
    text_vocabulary=64,
    image_vocabulary=64,
    grid=sized(16, 4),
)
"""Small vocabularies: the head costs about a block, so that stages are alike."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pipeline."""

    schedule: Schedule
    stages: int
    chunks: int = 1
    sleeps: bool = True

    @property
    def name(self) -> str:
        """What it is called in a row."""
        what = "sleeping" if self.sleeps else "a prior's"
        return f"PP{self.stages}, {what} blocks, {self.schedule}"

    @property
    def engine(self) -> EngineConfig:
        """Its settings."""
        return EngineConfig(
            name="torch",
            schedule=self.schedule,
            virtual_stages=self.chunks,
            gradient_accumulation_steps=MICRO_BATCHES,
        )


RUNS = [
    Run(schedule="1f1b", stages=2, sleeps=False),
    Run(schedule="interleaved", stages=2, chunks=2, sleeps=False),
    Run(schedule="1f1b", stages=4),
    Run(schedule="interleaved", stages=4, chunks=2),
    Run(schedule="zero-bubble", stages=4),
]


def run() -> list[Row]:
    """One row a pipeline: its bubble; a ratio above 1 means less than the schedule's."""
    rows = []
    for each in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            body = json.dumps({"run": asdict(each), "out": folder})
            launch(f"{__name__}:run_rank", body, each.stages, PRELOAD)
            paths = [Path(folder, f"{rank}.json") for rank in range(each.stages)]
            ranks = [json.loads(path.read_text()) for path in paths]
        shares = [_shares(each, [rank[i] for rank in ranks]) for i in range(ROUNDS)]
        measured = statistics.median(share for share, _ in shares)
        own = statistics.median(share for _, share in shares)
        ratios = [share / max(real, 1e-9) for real, share in shares]
        rows.append(
            bench_row(each.name, measured, "of the step", f"schedule's own {own:.3f}", ratios)
        )
    return rows


def _shares(each: Run, stages: list[list[float]]) -> tuple[float, float]:
    """The bubble of the busiest stage: measured, and by the schedule; of each stage's seconds of
    the step, and of its passes in their order."""

    def seconds(stage: int, number: int, _one: Pass) -> float:
        return stages[stage][1 + number]

    played = play(each.schedule, each.stages, MICRO_BATCHES, each.chunks, seconds)
    return 1 - played.busy / max(row[0] for row in stages), played.bubble


def run_rank(payload: str) -> None:
    """Writes seconds of the step and of each pass, by round, on this rank."""
    body = json.loads(payload)
    each = from_json(Run, body["run"])
    torch.set_num_threads(1)
    world = join_world()
    mesh = build_mesh(MeshConfig(pipeline=each.stages), world)
    step = sleeping(each, mesh) if each.sleeps else working(each, mesh)
    rows = []
    for i in range(ROUNDS + 1):
        dist.barrier()
        began = time.perf_counter()
        spent = step()
        dist.barrier()  # a step ends with the last stage
        rows.append([time.perf_counter() - began, *spent])
        if i == 0:
            rows.clear()  # connections are made
    Path(body["out"], f"{world.rank}.json").write_text(json.dumps(rows))
    leave_world(world)


def sleeping(each: Run, mesh: Mesh) -> Callable[[], list[float]]:
    """A step of the engine's pipeline over blocks that sleep."""
    layers = [Layer(name=f"block{i}", build=_Sleeper) for i in range(SLEEPERS)]
    program = Program(layers=layers, loss=_mean, losses=("loss",), state=lambda _: (1, WIDTH))
    chunks = chunks_of(program, each.engine, mesh)
    pipeline = Pipeline(program, chunks, [[] for _ in chunks], each.engine, mesh)
    batches: list[Batch] = [{"x": torch.ones(1, WIDTH, device="cpu")} for _ in range(MICRO_BATCHES)]
    slept = SECONDS * SLEEPERS / each.stages / each.chunks
    both = 1 if each.schedule == "zero-bubble" else 2  # halves of a backward pass
    passes = order(each.schedule, mesh.pipeline.rank, each.stages, MICRO_BATCHES, each.chunks)
    spent = [slept if one.kind == "forward" else both * slept for one in passes]

    def step() -> list[float]:
        pipeline.run(batches)
        return spent

    return step


def working(each: Run, mesh: Mesh) -> Callable[[], list[float]]:
    """Passes of engine torch over a prior; their seconds are measured on this rank."""
    settings = EngineSettings(optim=OPTIM, engine=each.engine, compress=CompressConfig(), seed=SEED)
    engine: Any = build_engine(prior_program(MODEL, SEED, mesh.shared), settings, mesh)
    draws = torch.Generator().manual_seed(SEED)
    shapes = {"text": MODEL.text_length, "image": MODEL.image_length}
    batches: list[Batch] = [
        {
            name: torch.randint(0, 64, (1, n), generator=draws, device="cpu")
            for name, n in shapes.items()
        }
        for _ in range(MICRO_BATCHES)
    ]
    spent: list[float] = []
    for chunk in engine._pipeline._chunks:
        chunk.forward = _timed(chunk.forward, spent)
    engine._passes(batches)  # makes the schedule
    engine._forget()
    (schedule,) = engine._pipeline._schedules.values()
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        stage.backward_one_chunk = _timed(stage.backward_one_chunk, spent)

    def step() -> list[float]:
        spent.clear()
        engine._passes(batches)
        engine._forget()
        return list(spent)

    return step


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments, **named)
        spent.append(time.perf_counter() - began)
        return result

    return timed


def _mean(state: Any, _batch: Batch) -> Losses:
    return {"loss": state.mean()}


class _Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, device="cpu"))

    def forward(self, state: Any) -> Tensor:
        out: Tensor = _Sleep.apply(state["x"] if isinstance(state, dict) else state, self.weight)
        return out


class _Sleep(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        time.sleep(SECONDS)
        return x + weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        time.sleep(SECONDS * (wants_input() + wants_weights()))
        states = gradient.clone() if wants_input() else None
        return states, gradient.sum(0) if wants_weights() else None
