"""One rank of a rehearsal: the real engine makes its steps in a world that is only claimed."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.clip import Clip
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.prior import prior_program
from parallel.engines.catalogue import build_engine
from parallel.engines.protocol import Batch, EngineSettings, Program
from parallel.mesh import Mesh, build_mesh
from parallel.world import join_world
from planning.rehearse_tensors import Broker, NeverSent, Shadows, without_arithmetic
from planning.sequence import Sequence
from planning.sequence_record import Recorder, groups_noted, places
from training.config import StageConfig
from training.picture_tasks import clip_program, dvae_program
from training.recovery import Recovery


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """What one rank rehearses; its model's sizes are all filled in."""

    stage: str
    settings: StageConfig
    rank: int
    steps: int
    """Training steps."""


def run_rank(task: RankTask, broker: Broker) -> Sequence:
    """The sequence of one rank: it joins, builds its engine, trains, evaluates and compares.

    It ends early with an error, which is noted, or with a message that nobody sends.
    """
    recorder = Recorder(task.rank)
    try:
        with (
            claimed_world(task.rank, task.settings.mesh.world, recorder),
            without_arithmetic(),
            Shadows(recorder, broker),
        ):
            train(task)
    except NeverSent:
        pass  # the sequence ends in this call, which its check will find
    except Exception as error:
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        lines = "".join(f"\n      at {place}" for place in places(list(frames)[-1]))
        recorder.sequence.failure = f"{type(error).__name__}: {error}{lines}"
    return recorder.sequence


def train(task: RankTask) -> None:
    """What the loop does with an engine, on any rank of any world, on batches of zeros."""
    settings = task.settings
    mesh = build_mesh(settings.mesh, join_world())
    parts = EngineSettings(
        optim=settings.optim,
        engine=settings.engine,
        compress=settings.compress,
        seed=settings.loop.seed,
    )
    engine = build_engine(_program(task.stage, settings, mesh), parts, mesh)
    batch = batch_of(task) if mesh.needs_data else {}
    for _ in range(task.steps):
        engine.step([batch] * settings.engine.accumulate, settings.optim.lr)
    engine.evaluate(batch)
    Recovery(settings.guard, mesh, settings.out).compare_replicas(engine, task.steps)


def _program(stage: str, settings: Any, mesh: Mesh) -> Program:
    if stage == "dvae":
        return dvae_program(DVAE(settings.model, settings.loop.seed), settings.model)
    if stage == "clip":
        return clip_program(Clip(settings.model, settings.loop.seed), mesh.world)
    return prior_program(settings.model, settings.loop.seed, mesh.shared)


def batch_of(task: RankTask) -> Batch:
    """One micro-batch of zeros."""
    settings: Any = task.settings
    model = settings.model
    count = settings.loop.batch // settings.mesh.data // settings.engine.accumulate
    if isinstance(model, PriorConfig):
        text = torch.zeros(count, model.text_length, dtype=torch.int64)
        return {"text": text, "image": torch.zeros(count, model.image_length, dtype=torch.int64)}
    pixels = torch.zeros(count, 3, model.pixels, model.pixels)
    if isinstance(model, ClipConfig):
        text = torch.zeros(count, model.text_length, dtype=torch.int64)
        return {"pixels": pixels, "text": text}
    assert isinstance(model, DVAEConfig)
    keys = torch.tensor([0] * count)
    return {"pixels": pixels, "keys": keys, "tau": torch.tensor(1.0), "beta": torch.tensor(1.0)}


@contextmanager
def claimed_world(rank: int, size: int, recorder: Recorder) -> Iterator[None]:
    """Let this process believe that it is a rank of a world that a launcher started."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
    original = dist.init_process_group

    def init_process_group(*_: Any, **__: Any) -> None:
        original("fake", rank=rank, world_size=size, store=FakeStore())

    def claim(named: dict[str, Any]) -> None:
        named["backend"] = "fake"
        named.pop("pg_options", None)

    dist.init_process_group = init_process_group
    try:
        with groups_noted(recorder, claim):
            yield
    finally:
        dist.init_process_group = original
        if dist.is_initialized():
            dist.destroy_process_group()
