"""The copies of tied tables on the first and the last stage stay bitwise equal."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench.parity import BATCH, OPTIM, PRELOAD, SEED, Case, batch_of, program_of
from cluster.launcher import launch
from core.config import from_json
from models.config import PriorConfig
from parallel.config import EngineConfig, MeshConfig
from parallel.engines.protocol import EngineSettings
from parallel.engines.registry import build_engine
from parallel.mesh import build_mesh
from parallel.world import join_world, leave_world
from training.recovery.config import GuardConfig
from training.recovery.rewind import Recovery

CASE = Case(
    name="tied PP2 x DP3",
    mesh=MeshConfig(pipeline=2, data=3),
    engine=EngineConfig(name="deepspeed_pipe", gradient_accumulation_steps=2),
    model=PriorConfig(
        dim=48,
        heads=2,
        layers=3,
        text_length=6,
        text_vocabulary=901,
        image_vocabulary=207,
        grid=4,
        tied=True,
    ),
    steps=4,
)
"""Rings of more than two ranks add in an order that depends on a tensor's place in its bucket."""


def train_rank(payload: str) -> None:
    """Train, and compare the replicas after each step, as guard.compare_every=1."""
    case = from_json(Case, json.loads(payload))
    torch.set_float32_matmul_precision("highest")
    world = join_world()
    mesh = build_mesh(case.mesh, world)
    settings = EngineSettings(optim=OPTIM, engine=case.engine, compress=case.compress, seed=SEED)
    engine = build_engine(program_of(case, mesh), settings, mesh)
    recovery = Recovery(GuardConfig(compare_every=1), mesh, Path())
    size = BATCH // case.mesh.data // case.engine.gradient_accumulation_steps
    for step in range(case.steps):
        whole = batch_of(step, case.model)
        mine = {name: x[mesh.data.rank :: mesh.data.size] for name, x in whole.items()}
        micro = [
            {name: x[i * size : (i + 1) * size] for name, x in mine.items()}
            for i in range(case.engine.gradient_accumulation_steps)
        ]
        assert not engine.step(micro, OPTIM.lr).skipped
        recovery.compare_replicas(engine, step + 1)
    engine.close()
    leave_world(world)


@pytest.mark.world
def test_copies_on_both_ends_stay_equal() -> None:
    launch(f"{__name__}:train_rank", json.dumps(asdict(CASE)), CASE.mesh.world, PRELOAD)
