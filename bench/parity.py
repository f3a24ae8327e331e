"""Largest difference between each mesh or engine and one process, over some steps.

Every configuration trains the same small prior on the same random tokens; a row's value is the
largest relative difference of loss and gradient norm over all steps.
"""

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench.support.rows import bench_row
from bench.support.sizes import sized
from cluster.launcher import launch
from core.config import from_json
from core.keys import key_int
from models.adapters import adapted
from models.config import LoraConfig, PriorConfig
from models.prior import prior_program
from parallel.config import CompressConfig, EngineConfig, MeshConfig, OptimConfig
from parallel.engines.frozen import freeze
from parallel.engines.protocol import Batch, Engine, EngineSettings, Losses, Program
from parallel.engines.registry import ENGINES, MEGATRON, build_engine
from parallel.ledger import Ledger, recorded
from parallel.mesh import Mesh, build_mesh
from parallel.pipelines.schedules import Schedule
from parallel.world import join_world, leave_world

MODEL = PriorConfig(
    dim=48, heads=6, layers=5, text_length=6, text_vocabulary=50, image_vocabulary=30, grid=4
)
BATCH, STEPS, SEED = 16, 20, 5
BOUND = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest allowed difference; bf16 has 8 bits of mantissa, and ranks add partial sums apart."""
PRELOAD = ["torch", "torch.distributed", *(module for module, _ in ENGINES.values()), MEGATRON]
"""Of all engines: the first world that is launched decides what its forkserver imports."""
OPTIM = OptimConfig(lr=4.5e-4, warmup=5, clip_norm=0.5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    name: str
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    moments: Literal["fp32", "bf16"] = "fp32"
    steps: int = STEPS
    model: PriorConfig = MODEL
    lora: LoraConfig = field(default_factory=LoraConfig)
    freeze: str = ""
    broken_step: int = -1
    """Step at which the last rank's loss is not a number; -1 = none."""

    def precise(self, precision: str) -> "Case":
        """The same in another precision."""
        engine = EngineConfig(**{**asdict(self.engine), "precision": precision})
        return Case(**{**vars(self), "name": f"{self.name} {precision}", "engine": engine})


def _pipe(
    tensor: int = 1, pipeline: int = 1, data: int = 1, sequence: bool = False, **engine: Any
) -> Case:
    shared = "SP" if sequence else "TP"
    name = "x".join(
        f"{axis}{n}" for axis, n in ((shared, tensor), ("PP", pipeline), ("DP", data)) if n > 1
    )
    settings = EngineConfig(name="deepspeed_pipe", gradient_accumulation_steps=4, **engine)
    mesh = MeshConfig(tensor=tensor, pipeline=pipeline, data=data, sequence_parallel=sequence)
    return Case(name=f"{name} pipe", mesh=mesh, engine=settings)


def _zero(
    stage: int, tensor: int = 1, data: int = 2, nodes: int = 1, sequence: bool = False
) -> Case:
    shared = "SP" if sequence else "TP"
    name = f"{shared}{tensor}xDP{data}" if tensor > 1 else f"DP{data}"
    layout = f"paper layout, {nodes} nodes of {data // nodes}"
    return Case(
        name=layout if nodes > 1 else f"{name} ZeRO-{stage}",
        mesh=MeshConfig(tensor=tensor, data=data, nodes=nodes, sequence_parallel=sequence),
        engine=EngineConfig(name="deepspeed_zero", zero_stage=stage, gradient_accumulation_steps=2),
    )


def _chunks(
    schedule: Schedule,
    chunks: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    sequence: bool = False,
) -> Case:
    shared = "SP" if sequence else "TP"
    mesh = MeshConfig(tensor=tensor, pipeline=pipeline, data=data, sequence_parallel=sequence)
    name = "x".join(
        f"{axis}{n}" for axis, n in ((shared, tensor), ("PP", pipeline), ("DP", data)) if n > 1
    )
    engine = EngineConfig(
        name="torch", schedule=schedule, virtual_stages=chunks, gradient_accumulation_steps=4
    )
    return Case(name=f"{name} {schedule} torch", mesh=mesh, engine=engine)


def _torch(tensor: int = 1, data: int = 2, nodes: int = 1, sequence: bool = False) -> Case:
    shared = "SP" if sequence else "TP"
    name = f"{shared}{tensor}xDP{data}" if tensor > 1 else f"DP{data}"
    layout = f"{nodes} nodes of {data // nodes}"
    return Case(
        name=f"{layout if nodes > 1 else name} torch",
        mesh=MeshConfig(tensor=tensor, data=data, nodes=nodes, sequence_parallel=sequence),
        engine=EngineConfig(name="torch", gradient_accumulation_steps=2),
    )


ONE = Case(name="one process")
CASES = [
    Case(name="DP2 reference", mesh=MeshConfig(data=2)),
    _pipe(tensor=2),
    _pipe(pipeline=2),
    _pipe(pipeline=4),
    _pipe(data=2),
    _pipe(tensor=2, pipeline=2),
    _pipe(tensor=2, pipeline=2, data=2),
    _pipe(tensor=4),
    *(_zero(stage) for stage in (1, 2, 3)),
    *(_zero(stage, tensor=2) for stage in (1, 2, 3)),
    _zero(3, data=4, nodes=2),
    _torch(data=2),
    _torch(data=4),
    _torch(tensor=2, data=2),
    _torch(data=4, nodes=2),
    _pipe(tensor=2, sequence=True),
    _pipe(tensor=2, pipeline=2, sequence=True),
    *(_zero(stage, tensor=2, sequence=True) for stage in (1, 2, 3)),
    _torch(tensor=2, sequence=True),
    _chunks("1f1b", pipeline=2),
    _chunks("interleaved", 2, pipeline=2),
    _chunks("zero-bubble", pipeline=2),
    _chunks("zero-bubble", 2, tensor=2, pipeline=2, data=2),
    _chunks("interleaved", 2, tensor=2, pipeline=2, data=2),
    _chunks("1f1b", tensor=2, pipeline=2, data=2),
    _chunks("1f1b", pipeline=4),
    _chunks("zero-bubble", pipeline=4),
    _chunks("zero-bubble", 2, pipeline=2, sequence=True, tensor=2),
]
"""TP4 has padded heads: 6 heads become 8. SP: tensor ranks share the positions, too."""


def run() -> list[dict[str, Any]]:
    """One row a configuration and precision; ratio > 1 means inside of the bound."""
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for precision, bound in sized(BOUND, {"fp32": BOUND["fp32"]}).items():
        single = train(ONE.precise(precision))
        for case in sized(CASES, CASES[:1]):
            worst = difference(single, train(case.precise(precision)))
            rows.append(
                bench_row(
                    f"{case.name} {precision}",
                    worst,
                    "relative difference",
                    f"bound {bound:g}",
                    [worst],
                    ratio=bound / max(worst, 1e-12),
                )
            )
    return rows


def train(case: Case, target: str = "bench.parity:train_rank") -> list[dict[str, Any]]:
    """Train under one configuration; returns losses, norm and facts of each step."""
    with tempfile.TemporaryDirectory() as folder:
        payload = json.dumps({**asdict(case), "out": folder})
        launch(target, payload, case.mesh.world, PRELOAD)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
        return rows


def difference(
    a: list[dict[str, Any]],
    b: list[dict[str, Any]],
    fields: tuple[str, ...] = ("loss", "grad_norm"),
) -> float:
    """Largest relative difference of loss and gradient norm over all steps."""
    assert len(a) == len(b) > 0, "two runs of different length"
    errors: list[float] = [
        abs(x[name] - y[name]) / abs(x[name]) for x, y in zip(a, b, strict=True) for name in fields
    ]
    return max(errors)


def batch_of(step: int, config: PriorConfig) -> Batch:
    """The global batch of a step: random tokens."""
    draws = torch.Generator().manual_seed(key_int(SEED, step, "parity"))
    text = torch.randint(0, config.text_vocabulary, (BATCH, config.text_length), generator=draws)
    text[: BATCH // 2, -2:] = -1
    image = torch.randint(0, config.image_vocabulary, (BATCH, config.image_length), generator=draws)
    return {"text": text, "image": image}


def program_of(case: Case, mesh: Mesh) -> Program:
    """A case's prior, with its adapters and frozen parameters."""
    program = adapted(prior_program(case.model, SEED, mesh.shared), case.lora, SEED)
    return freeze(program, case.freeze)


def train_rank(payload: str) -> None:
    """Train on this rank; rank 0 writes rows.json."""
    body = json.loads(payload)
    out = Path(body.pop("out"))
    case = from_json(Case, body)
    torch.set_float32_matmul_precision("highest")
    world = join_world()
    mesh = build_mesh(case.mesh, world)
    optim = replace(OPTIM, moments=case.moments)
    settings = EngineSettings(optim=optim, engine=case.engine, compress=case.compress, seed=SEED)
    breaks = [False]

    program = program_of(case, mesh)

    def loss(logits: Any, batch: Batch) -> Losses:
        figures = program.loss(logits, batch)
        return {**figures, "loss": figures["loss"] * math.nan} if breaks[0] else figures

    with recorded(mesh) as ledger:
        engine = build_engine(replace(program, loss=loss), settings, mesh)
        rows = _steps(case, engine, mesh, ledger, breaks)
    if world.rank == 0:
        (out / "rows.json").write_text(json.dumps(rows))
    leave_world(world)


def _steps(
    case: Case, engine: Engine, mesh: Mesh, ledger: Ledger, breaks: list[bool]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(case.steps):
        breaks[0] = step == case.broken_step and mesh.world.rank == mesh.world.size - 1
        whole = batch_of(step, case.model)
        rows_of_rank = slice(mesh.data.rank, None, mesh.data.size)
        mine = {name: value[rows_of_rank].to(mesh.world.device) for name, value in whole.items()}
        size = len(mine["text"]) // case.engine.gradient_accumulation_steps
        micro = [
            {name: value[i * size : (i + 1) * size] for name, value in mine.items()}
            for i in range(case.engine.gradient_accumulation_steps)
        ]
        with ledger.counted() as traffic:
            result = engine.step(micro, OPTIM.lr * min(1.0, (step + 1) / OPTIM.warmup))
        row = {**result.losses, "grad_norm": result.grad_norm, **result.facts}
        rows.append({**row, "comm": traffic.counts})
    rows[-1]["validation"] = float(engine.evaluate(mine)["loss"])
    engine.close()
    return rows
