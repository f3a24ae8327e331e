"""Time real steps of a mesh on this machine, for calibration and the benchmark."""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cluster.launcher import launch
from core.config import from_json, to_json
from core.heartbeat import Heart
from core.keys import key_int
from core.memory import keep_freed_memory
from models.prior import prior_program
from parallel.engines.protocol import Batch, EngineSettings
from parallel.engines.registry import build_engine, modules_of
from parallel.mesh import build_mesh
from parallel.precision import engine_numerics
from parallel.world import join_world, leave_world
from training.config import PriorTrain
from training.tasks.task import hand_over

WARM = 3
"""Warm-up steps that are not timed."""


def time_steps(settings: PriorTrain, steps: int) -> list[float]:
    """Seconds of each of `steps` steps, on newly spawned ranks.

    Raises: RankError if a rank fails.
    """
    with TemporaryDirectory() as folder:
        payload = {"settings": to_json(settings), "steps": steps, "out": folder}
        split = settings.mesh.world > settings.mesh.data
        preload = ["torch", "torch.distributed", *modules_of(settings.engine.name, split)]
        launch(
            "planning.calibration.trial:trial_rank",
            json.dumps(payload),
            settings.mesh.world,
            preload,
        )
        seconds: list[float] = json.loads(Path(folder, "seconds.json").read_text())
        return seconds


def trial_rank(payload: str) -> None:
    """Train on random tokens; rank 0 writes seconds.json."""
    body = json.loads(payload)
    settings = from_json(PriorTrain, body["settings"])
    torch.set_num_threads(1)
    keep_freed_memory()
    world = join_world()
    engine_numerics(world.device, settings.engine)
    mesh = build_mesh(settings.mesh, world)
    engine = build_engine(
        prior_program(settings.model, 0, mesh.shared),
        EngineSettings(
            optim=settings.optim, engine=settings.engine, compress=settings.compress, seed=0
        ),
        mesh,
    )
    seconds, heart = [], Heart(world.rank)
    for step in range(WARM + body["steps"]):
        drawn = _micro_batches(settings, step, mesh.data.rank)
        micro = [hand_over(batch, world.device) for batch in drawn]
        heart.beat("step", step)
        world.barrier()
        began = time.perf_counter()
        engine.step(micro, settings.optim.lr)
        seconds.append(time.perf_counter() - began)
    engine.close()
    if world.rank == 0:
        Path(body["out"], "seconds.json").write_text(json.dumps(seconds[WARM:]))
    leave_world(world)


def _micro_batches(settings: PriorTrain, step: int, replica: int) -> list[Batch]:
    config, times = settings.model, settings.engine.gradient_accumulation_steps
    size = settings.loop.global_batch_size // settings.mesh.data // times
    draws = torch.Generator().manual_seed(key_int(step, replica, "trial"))

    def drawn(most: int, length: int) -> torch.Tensor:
        return torch.randint(0, most, (size, length), generator=draws)

    return [
        {
            "text": drawn(config.text_vocabulary, config.text_length),
            "image": drawn(config.image_vocabulary, config.image_length),
        }
        for _ in range(times)
    ]
