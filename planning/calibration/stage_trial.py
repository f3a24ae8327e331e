"""Time steps of whole stages at growing sizes, on ranks that are started once."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cluster.launcher import launch
from core.heartbeat import Heart
from core.keys import key_int
from core.memory import keep_freed_memory
from models.clip import Clip
from models.dvae import DVAE
from models.prior import prior_program
from parallel.engines.protocol import Batch, EngineSettings, Program
from parallel.engines.registry import build_engine, modules_of
from parallel.mesh import Mesh, build_mesh
from parallel.precision import engine_numerics
from parallel.world import World, join_world, leave_world
from training.auto_precision import settle_precision
from training.config import StageConfig
from training.stages import parse_payload, to_payload
from training.tasks.clip import clip_program
from training.tasks.dvae_program import dvae_program
from training.tasks.task import hand_over

WARM, STEPS = 1, 3
"""Steps of each stage that are not timed, and that are."""
Sized = dict[str, StageConfig]
"""Stage -> settings; all stages have the same mesh."""


def time_sizes(
    sizes: Sequence[Sized], least: dict[str, int], seconds: float
) -> list[dict[str, float]]:
    """Seconds of a step of each stage, size by size, on newly spawned ranks.

    It ends after the first size of which `least` steps of each stage take more than `seconds`.
    Raises: RankError if a rank fails.
    """
    mesh = next(iter(sizes[0].values())).mesh
    engines = {
        module
        for size in sizes
        for s in size.values()
        for module in modules_of(s.engine.name, False)
    }
    with TemporaryDirectory() as folder:
        rows = [{name: to_payload(name, each) for name, each in size.items()} for size in sizes]
        body = {"sizes": rows, "least": least, "seconds": seconds, "out": folder}
        launch(
            "planning.calibration.stage_trial:sizes_rank",
            json.dumps(body),
            mesh.world,
            ["torch", "torch.distributed", *sorted(engines)],
        )
        measured: list[dict[str, float]] = json.loads(Path(folder, "seconds.json").read_text())
        return measured


def sizes_rank(payload: str) -> None:
    """Train on random batches; rank 0 writes seconds.json."""
    body = json.loads(payload)
    keep_freed_memory()
    world = join_world()
    heart, rows = Heart(world.rank), list[dict[str, float]]()
    for size in body["sizes"]:
        row = {}
        for name, text in size.items():
            settings = replace(parse_payload(text)[1], out=Path(body["out"], name))  # a new run
            row[name] = _slowest(world, _step_seconds(name, settings, world, heart))
        rows.append(row)
        if sum(body["least"][name] * each for name, each in row.items()) > body["seconds"]:
            break
    if world.rank == 0:
        Path(body["out"], "seconds.json").write_text(json.dumps(rows))
    leave_world(world)


def _slowest(world: World, seconds: float) -> float:
    """The same number on all ranks, so that they stop together."""
    return max(map(float, world.gather_text(repr(seconds))))


def _step_seconds(name: str, settings: StageConfig, world: World, heart: Heart) -> float:
    """Median of a stage's step on this rank."""
    settings = settle_precision(settings, world)
    engine_numerics(world.device, settings.engine)
    mesh = build_mesh(settings.mesh, world)
    draw, program = _PROGRAMS[name](settings, mesh)
    options = EngineSettings(
        optim=settings.optim, engine=settings.engine, compress=settings.compress, seed=0
    )
    engine = build_engine(program, options, mesh)
    count = settings.loop.global_batch_size // settings.mesh.data
    seconds = []
    for step in range(WARM + STEPS):
        draws = torch.Generator().manual_seed(key_int(step, world.rank, "trial"))
        batch = hand_over(draw(count, draws), world.device)
        heart.beat("step", step)
        world.barrier()
        began = time.perf_counter()
        engine.step([batch], settings.optim.lr)
        seconds.append(time.perf_counter() - began)
    engine.close()
    return statistics.median(seconds[WARM:])


Draw = Callable[[int, torch.Generator], Batch]


def _prior(settings: Any, mesh: Mesh) -> tuple[Draw, Program]:
    model = settings.model

    def draw(count: int, draws: torch.Generator) -> Batch:
        return {
            "text": _numbers(model.text_vocabulary, (count, model.text_length), draws),
            "image": _numbers(model.image_vocabulary, (count, model.image_length), draws),
        }

    return draw, prior_program(model, 0, mesh.shared)


def _dvae(settings: Any, _: Mesh) -> tuple[Draw, Program]:
    model = settings.model

    def draw(count: int, draws: torch.Generator) -> Batch:
        return {
            "pixels": torch.rand(count, 3, model.pixels, model.pixels, generator=draws),
            "keys": _numbers(2**31, (count,), draws),
            "tau": torch.tensor(settings.tau_first, device="cpu"),
            "beta": torch.tensor(settings.beta, device="cpu"),
        }

    return draw, dvae_program(DVAE(model, 0), model)


def _clip(settings: Any, mesh: Mesh) -> tuple[Draw, Program]:
    model = settings.model

    def draw(count: int, draws: torch.Generator) -> Batch:
        return {
            "pixels": torch.rand(count, 3, model.pixels, model.pixels, generator=draws),
            "text": _numbers(model.text_vocabulary, (count, model.text_length), draws),
        }

    return draw, clip_program(Clip(model, 0), mesh.world)


_PROGRAMS: dict[str, Callable[[Any, Mesh], tuple[Draw, Program]]] = {
    "prior": _prior,
    "dvae": _dvae,
    "clip": _clip,
}


def _numbers(most: int, shape: tuple[int, ...], draws: torch.Generator) -> torch.Tensor:
    return torch.randint(0, most, shape, generator=draws)
